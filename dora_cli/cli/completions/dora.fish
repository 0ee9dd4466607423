# dora-recipes completion fish | source
function __dora_complete
    set -l typed (commandline -opc)
    dora-recipes completion words (basename $typed[1]) $typed[2..-1] (commandline -ct) 2>/dev/null
end
for command in dora-train dora-merge dora-compress dora-eval dora-report dora-recipes
    complete -c $command -f -a '(__dora_complete)'
end
