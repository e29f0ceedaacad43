"""Completion of commands, options and their choices in a shell; `--print-completion` prints it.

zsh runs the same script as bash, through its own emulation. The shell completes by the word that a
line begins with, which is `python`: what is said here holds for lines that go on with `-m PROGRAM`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_jax.cli.arguments import Parser

CONSOLE_SCRIPT = "llama-jax"

_ZSH = """\
type compdef > /dev/null || { autoload -U +X compinit && compinit }
type complete > /dev/null || { autoload -U +X bashcompinit && bashcompinit }
"""

_SCRIPT = """\
_python_m_{name}() {{  # $1: where the program's arguments begin
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command= words=
    if [[ $word == "=" ]]; then word=; fi
    if [[ $before == "=" ]]; then before=${{COMP_WORDS[COMP_CWORD-2]}}; fi
    if (( COMP_CWORD > $1 )); then
        case "${{COMP_WORDS[$1]}}" in {commands}) command=${{COMP_WORDS[$1]}} ;; esac
    fi
    case "$command $before" in
{values}
    *)
        if [[ $word == -* ]]; then
            case "$command" in
{options}
            esac
        elif {when}; then words="{names}"
        fi ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
_python_m() {{
    COMPREPLY=()
    local complete_program=_python_m_${{COMP_WORDS[2]}}
    if [[ ${{COMP_WORDS[1]}} == -m ]] && (( COMP_CWORD > 2 )) && type $complete_program > /dev/null 2>&1
    then $complete_program 3
    fi
}}
complete -o default -o bashdefault -F _python_m python python3"""

_FOR_CONSOLE_SCRIPT = """
_{name}() {{ _python_m_{name} 1; }}
complete -o default -o bashdefault -F _{name} {script}"""


def completion_script(parser: Parser, shell: str) -> str:
    """A script for "bash" or "zsh"; words that it does not know are completed as names of files."""
    name = "llama_jax" if parser.prog == CONSOLE_SCRIPT else parser.prog.split()[-1]
    values, options = [], []
    names = list(parser.commands)
    for command, its_parser in {**parser.commands, "": parser}.items():
        flags: list[str] = []
        for action in its_parser._actions:
            flags += action.option_strings
            choices = " ".join(map(str, action.choices or ()))
            if choices and action.option_strings:
                values.append(f'    "{command} {action.option_strings[0]}") words="{choices}" ;;')
            elif its_parser is parser and not parser.commands:
                names += choices.split()
        options.append(f'            {command or "*"}) words="{" ".join(flags)}" ;;')
    when = "(( COMP_CWORD == $1 ))" if parser.commands else "true"
    if parser.commands and parser._subparsers is None:  # as likely as a command is a file
        when += ' && [[ -n "$word" ]]'
    script = _SCRIPT.format(
        name=name,
        values="\n".join(values),
        options="\n".join(options),
        commands=" | ".join(parser.commands) or '""',
        names=" ".join(names),
        when=when,
    )
    if name == "llama_jax":
        script += _FOR_CONSOLE_SCRIPT.format(name=name, script=CONSOLE_SCRIPT)
    return (_ZSH if shell == "zsh" else "") + script
