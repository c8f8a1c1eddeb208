#compdef %(prog_name)s
%(complete_func)s() {
    local -a response complete partial
    local type value help
    (( $+commands[%(prog_name)s] )) || return 1
    response=("${(@f)$(env COMP_WORDS="${words[*]}" COMP_CWORD=$((CURRENT-1)) %(complete_var)s=zsh_complete %(prog_name)s)}")
    for type value help in ${response}; do
        [[ $help == _ ]] && help=''
        case $type in
            dir) _path_files -/ ;;
            file) _path_files -f ;;
            *) if [[ $value == *[=.] ]]; then partial+=("$value:$help"); else complete+=("$value:$help"); fi ;;
        esac
    done
    (( $#complete )) && _describe -V unsorted complete -U
    (( $#partial )) && _describe -V unsorted partial -U -S ''
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
