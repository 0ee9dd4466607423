# eval "$(dora-recipes completion bash)"
_dora_complete() {
    local line="${COMP_LINE:0:COMP_POINT}" IFS=$' \t\n'
    local -a typed
    read -ra typed <<<"$line"
    [[ $line == *[[:space:]] ]] && typed+=("")
    local current="${typed[-1]}" offer
    # Readline takes a word apart at = and :, and only what follows the last of them is replaced.
    local kept=""
    [[ $COMP_WORDBREAKS == *=* && $current == *=* ]] && kept="${current%"${current##*=}"}"
    [[ $COMP_WORDBREAKS == *:* && $current == *:* ]] && kept="${current%"${current##*[=:]}"}"
    compopt -o nospace 2>/dev/null
    COMPREPLY=()
    while IFS= read -r offer; do
        case $offer in
            *[=./]) ;;
            *) offer="$(printf '%q' "$offer") " ;;
        esac
        COMPREPLY+=("${offer#"$kept"}")
    done < <(dora-recipes completion words "${1##*/}" "${typed[@]:1}" 2>/dev/null)
}
complete -F _dora_complete dora-train dora-merge dora-eval dora-report dora-recipes
