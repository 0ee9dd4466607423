"use strict";
// The rank map at the event that the slider names; without scripts the page shows the end.
(() => {
  const frames = JSON.parse(document.getElementById("frames").textContent);
  const slider = document.getElementById("step"), play = document.getElementById("play");
  const label = document.getElementById("frame");
  const rows = [...document.querySelectorAll(".ranks tbody tr")].map((row) => ({
    cells: [...row.querySelectorAll("td[data-module]")], total: row.querySelector(".total"),
  }));
  const deep = Number(document.querySelector(".ranks").dataset.deep);
  let timer = null;

  const show = (index) => {
    const frame = frames[index];
    label.textContent = frame.label;
    for (const { cells, total } of rows) {
      let sum = 0;
      for (const cell of cells) {
        const rank = frame.ranks[Number(cell.dataset.module)];
        sum += rank;
        cell.textContent = rank;
        cell.style.setProperty("--part", frame.parts[Number(cell.dataset.module)]);
        cell.classList.toggle("zero", rank === 0);
        cell.classList.toggle("deep", frame.parts[Number(cell.dataset.module)] > deep);
      }
      total.textContent = sum;
    }
  };
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };

  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  play.addEventListener("click", () => {
    if (timer !== null) { stop(); return; }
    if (Number(slider.value) === frames.length - 1) slider.value = 0;
    show(Number(slider.value));
    play.textContent = "Stop";
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show(Number(slider.value));
      if (Number(slider.value) === frames.length - 1) stop();
    }, 350);
  });
})();
