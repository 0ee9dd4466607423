// Browsers start no worker from a file:// page, so the search would be dead on the disk. There, a hidden frame is one.
"use strict"
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.appendChild(this.frame)
      const inside = this.frame.contentWindow
      window.addEventListener("message", (event) => {
        if (event.source === inside) this.dispatchEvent(new MessageEvent("message", { data: event.data }))
      })
      // The worker's own script calls postMessage(data) to answer; in a frame that would be sent to the frame itself.
      inside.document.write(
        "<!doctype html><script>postMessage = (data) => parent.postMessage(data, '*')<\/script>" +
          `<script src="${new URL(url, location.href)}" onload="parent.dispatchEvent(new Event('search-ready'))"><\/script>`
      )
      inside.document.close()
      window.addEventListener("search-ready", () => {
        for (const data of this.waiting.splice(0)) this.send(data)
        this.ready = true
      })
    }
    postMessage(data) {
      this.ready ? this.send(data) : this.waiting.push(data)
    }
    send(data) {
      this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data, source: window }))
    }
    terminate() {
      this.frame.remove()
    }
  }
}
