# eval "$(dora-recipes completion bash)"
_dora_complete() {
    local line="${COMP_LINE:0:COMP_POINT}" IFS=$' \t\n'
    local -a typed
    read -a typed <<<"$line" # without -r, so that my\ dir is one word, and without its backslash
    [[ $line == *[[:space:]] && $line != *\\[[:space:]] ]] && typed+=("")
    local current="${typed[${#typed[@]}-1]}" offer end
    # Readline takes a word apart at = and :, and only what follows the last of them is replaced.
    local kept=""
    [[ $COMP_WORDBREAKS == *=* && $current == *=* ]] && kept="${current%"${current##*=}"}"
    [[ $COMP_WORDBREAKS == *:* && $current == *:* ]] && kept="${current%"${current##*[=:]}"}"
    compopt -o nospace 2>/dev/null
    COMPREPLY=()
    while IFS= read -r offer; do
        [[ -n $offer ]] || continue
        end=" "
        [[ $offer == *[=./] ]] && end=""
        printf -v offer %q "${offer#"$kept"}"
        offer="${offer//\\,/,}"                    # no shell minds a comma
        [[ $offer == \\~* ]] && offer="${offer:1}" # the user's home, as typed
        COMPREPLY+=("$offer$end")
    done < <(dora-recipes completion words "${1##*/}" "${typed[@]:1}" 2>/dev/null)
}
complete -F _dora_complete dora-train dora-merge dora-compress dora-eval dora-report dora-recipes
