"""Completion scripts for bash, zsh and fish, written from `Words`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from tuner.cli.completion_words import FILES, FOLDERS, SETS, Flag, Place, Words


def script(shell: str, words: Words) -> str:
    """The script for one shell."""
    writers: Mapping[str, Callable[[Words], Iterator[str]]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    first = ["#compdef tuner"] if shell == "zsh" else []
    return "\n".join((*first, f"# Made by: tuner completion {shell}", *writers[shell](words)))


# --- bash and zsh -----------------------------------------------------------------------------------------------------


def _shared(words: Words) -> Iterator[str]:
    """Functions that bash and zsh both understand: lists of words, by kind, by key, and by what stands before."""
    yield "_tuner_list() {"
    yield '    case "$1" in'
    for kind, listed in words.lists.items():
        yield f"        {kind}) echo '{' '.join(listed)}' ;;"
    yield "        commands) echo '" + " ".join(words.commands) + "' ;;"
    for command, actions in words.actions.items():
        yield f"        actions-{command}) echo '{' '.join(actions)}' ;;"
    yield "    esac\n}"
    yield "_tuner_values() {"
    yield '    case "$1" in'
    for values, keys in _grouped(words.values):
        yield f"        {'|'.join(keys)}) echo '{' '.join(values)}' ;;"
    yield "    esac\n}"
    yield "# The kinds of words that may follow an option, or 'none' after anything else."
    yield "_tuner_after() {"
    yield '    case "$1 $2" in'
    for kinds, places in _grouped(_after(words)):
        yield f"        {'|'.join(_quoted(place) for place in places)}) echo '{' '.join(kinds)}' ;;"
    yield "        *) echo none ;;\n    esac\n}"
    yield "# The options of a command, and the kinds of its arguments."
    yield "_tuner_flags() {"
    yield '    case "$1" in'
    for place in words.places:
        yield f"        {_quoted(place.name)}) echo '{' '.join(flag.name for flag in place.flags)}' ;;"
    yield "    esac\n}"
    yield "_tuner_arguments() {"
    yield '    case "$1" in'
    for place in words.places:
        if place.words:
            yield f"        {_quoted(place.name)}) echo '{' '.join(place.words)}' ;;"
    yield "    esac\n}"


def _bash(words: Words) -> Iterator[str]:
    yield from _shared(words)
    yield (
        r"""
_tuner_add() {
    COMPREPLY+=($(compgen -W "$1" -- "$cur"))
}
_tuner_paths() {
    local IFS=$'\n'
    COMPREPLY+=($(compgen "$1" -- "$cur"))
    compopt -o filenames 2>/dev/null
}
_tuner_offer() {
    local kind
    for kind in $1; do
        case "$kind" in
            @FILES@) _tuner_paths -f ;;
            @FOLDERS@) _tuner_paths -d ;;
            @SETS@)
                compopt -o nospace 2>/dev/null
                if [[ "$cur" == *=* ]]; then
                    local key="${cur%%=*}" value
                    for value in $(_tuner_values "$key"); do _tuner_add "$key=$value"; done
                else
                    local name
                    for name in $(_tuner_list keys); do
                        [[ "$name" == "$cur"* ]] && COMPREPLY+=("$name=")
                    done
                fi ;;
            @LISTS@) _tuner_add "$(_tuner_list "$kind")" ;;
            *) _tuner_add "$kind" ;;
        esac
    done
}
_tuner() {
    local line="${COMP_LINE:0:COMP_POINT}" cur previous place kinds
    local -a parts
    # Without -r, so that a blank in a name may be written with a backslash.
    read -a parts <<< "$line"
    [[ "$line" == *[!\\][[:space:]] ]] && parts+=("")
    local count=${#parts[@]}
    cur="${parts[count-1]}" previous="${parts[count-2]}" place="${parts[1]}"
    COMPREPLY=()
    if [[ "$cur" == --*=* ]]; then
        previous="${cur%%=*}" cur="${cur#*=}"
    fi
    if ((count == 2)); then
        _tuner_add "$(_tuner_list commands) --help --version"
    else
        if [[ -n "$(_tuner_list "actions-$place")" ]]; then
            if ((count == 3)); then
                _tuner_add "$(_tuner_list "actions-$place") --help"
                return
            fi
            place="$place ${parts[2]}"
        fi
        kinds="$(_tuner_after "$place" "$previous")"
        if [[ "$kinds" != none ]]; then
            _tuner_offer "$kinds"
        elif [[ "$cur" == -* ]]; then
            _tuner_add "$(_tuner_flags "$place")"
        else
            _tuner_offer "$(_tuner_arguments "$place")"
        fi
    fi
    # bash takes a word with = for several, so only what follows the last = is to be replaced.
    if [[ "$cur" == *=* && "$COMP_WORDBREAKS" == *=* ]]; then
        COMPREPLY=("${COMPREPLY[@]#"${cur%=*}="}")
    fi
}
complete -F _tuner tuner""".replace("@FILES@", FILES)
        .replace("@FOLDERS@", FOLDERS)
        .replace("@SETS@", SETS)
        .replace("@LISTS@", "|".join(words.lists))
    )


def _zsh(words: Words) -> Iterator[str]:
    yield from _shared(words)
    yield (
        r"""
_tuner_offer() {
    local kind
    for kind in ${=1}; do
        case "$kind" in
            @FILES@) _files ;;
            @FOLDERS@) _files -/ ;;
            @SETS@)
                if [[ "$PREFIX" == *=* ]]; then
                    local key="${PREFIX%%=*}"
                    local -a found=(${=$(_tuner_values "$key")})
                    compadd -- "$key="$^found
                else
                    compadd -S = -q -- ${=$(_tuner_list keys)}
                fi ;;
            @LISTS@) compadd -- ${=$(_tuner_list "$kind")} ;;
            *) compadd -- "$kind" ;;
        esac
    done
}
_tuner() {
    local place="${words[2]}" kinds
    if ((CURRENT == 2)); then
        local -a commands=(
@COMMANDS@
        )
        _describe command commands
        compadd -- --help --version
        return
    fi
    if [[ -n "$(_tuner_list "actions-$place")" ]]; then
        if ((CURRENT == 3)); then
            compadd -- ${=$(_tuner_list "actions-$place")} --help
            return
        fi
        place="$place ${words[3]}"
    fi
    local previous="${words[CURRENT-1]}"
    if [[ "$PREFIX" == --*=* ]]; then
        previous="${PREFIX%%=*}"
        compset -P 1 '*='
    fi
    kinds="$(_tuner_after "$place" "$previous")"
    if [[ "$kinds" != none ]]; then
        _tuner_offer "$kinds"
    elif [[ "$PREFIX" == -* ]]; then
        compadd -- ${=$(_tuner_flags "$place")}
    else
        _tuner_offer "$(_tuner_arguments "$place")"
    fi
}
if [[ "${funcstack[1]}" == _tuner ]]; then _tuner "$@"; else compdef _tuner tuner; fi""".replace("@FILES@", FILES)
        .replace("@FOLDERS@", FOLDERS)
        .replace("@SETS@", SETS)
        .replace("@LISTS@", "|".join(words.lists))
        .replace(
            "@COMMANDS@", "\n".join(f"            {_quoted(f'{name}:{help}')}" for name, help in words.commands.items())
        )
    )


def _after(words: Words) -> dict[str, tuple[str, ...]]:
    """``place --option`` to the kinds of its value."""
    return {
        f"{place.name} {flag.name}": flag.words
        for place in words.places
        for flag in place.flags
        if flag.words is not None
    }


def _grouped(values: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Names that have the same words, together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, each in values.items():
        groups.setdefault(each, []).append(name)
    yield from groups.items()


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# --- fish -------------------------------------------------------------------------------------------------------------


def _fish(words: Words) -> Iterator[str]:
    yield "function __tuner_keys"
    for key in words.lists["keys"]:
        yield f"    echo {key}="
    yield "end"
    yield "function __tuner_sets"
    yield "    set -l current (string replace -r '^--[^=]*=' '' -- (commandline -ct))"
    yield "    if not string match -q '*=*' -- $current"
    yield "        __tuner_keys"
    yield "        return"
    yield "    end"
    yield "    set -l key (string split -m1 = -- $current)[1]"
    yield "    switch $key"
    for values, keys in _grouped(words.values):
        yield f"        case {' '.join(keys)}"
        yield (
            f"            printf '%s\\n' $key={{{','.join(values)}}}"
            if len(values) > 1
            else (f"            echo $key={values[0]}")
        )
    yield "    end\nend"
    yield "function __tuner_at"
    yield "    set -l parts (commandline -opc)"
    yield "    set -l last (math 1 + (count $argv))"
    yield '    test (count $parts) -ge $last; and test "$parts[2..$last]" = "$argv"'
    yield "end"
    yield "complete -c tuner -f"
    first = "'test (count (commandline -opc)) -eq 1'"
    for name, summary in words.commands.items():
        yield f"complete -c tuner -n {first} -a {name} -d {_fish_quoted(summary)}"
    for command, actions in words.actions.items():
        test = f"'__tuner_at {command}; and test (count (commandline -opc)) -eq 2'"
        for action, summary in actions.items():
            yield f"complete -c tuner -n {test} -a {action} -d {_fish_quoted(summary)}"
    for place in words.places:
        yield from _fish_place(place, words)


def _fish_place(place: Place, words: Words) -> Iterator[str]:
    test = f"'__tuner_at {place.name}'"
    for flag in place.flags:
        yield f"complete -c tuner -n {test} -l {flag.name.removeprefix('--')} {_fish_value(flag, words)}".rstrip() + (
            f" -d {_fish_quoted(flag.help)}" if flag.help else ""
        )
    wanted = _fish_words(place.words, words)
    if wanted:
        yield f"complete -c tuner -n {test} {wanted}"


def _fish_value(flag: Flag, words: Words) -> str:
    if flag.words is None:
        return ""
    # -r: the value may be a file; -x: it may not.
    paths = FILES in flag.words or FOLDERS in flag.words
    return f"{'-r' if paths else '-x'} {_fish_words(flag.words, words)}".rstrip()


def _fish_words(kinds: Sequence[str], words: Words) -> str:
    """Arguments of ``complete`` that offer these kinds of words."""
    offered: list[str] = []
    for kind in kinds:
        if kind == SETS:
            offered.append("(__tuner_sets)")
        elif kind == FOLDERS:
            offered.append("(__fish_complete_directories)")
        elif kind != FILES:
            offered += words.lists.get(kind, (kind,))
    parts = ["-F"] if FILES in kinds else []
    parts += [f"-a {_fish_quoted(' '.join(offered))}"] if offered else []
    return " ".join(parts)


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
