#compdef dora-train dora-merge dora-compress dora-eval dora-report dora-recipes
# eval "$(dora-recipes completion zsh)"        (after compinit)
_dora_complete() {
    local offer
    local -a whole begun
    for offer in ${(f)"$(dora-recipes completion words ${words[1]:t} "${(@)words[2,CURRENT-1]}" "$PREFIX" 2>/dev/null)"}; do
        case $offer in
            (*[=./]) begun+=("$offer") ;;
            (*) whole+=("$offer") ;;
        esac
    done
    compadd -S '' -a -- begun
    compadd -a -- whole
}
compdef _dora_complete dora-train dora-merge dora-compress dora-eval dora-report dora-recipes
