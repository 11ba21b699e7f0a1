"""Reads the flags of a door, prints them for --help, and words what absl has to say about them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from absl import flags

from spt_jax.errors import UserError, nearest

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
}


def read_flags(
    door: str,
    flag_values: flags.FlagValues,
    arguments: Sequence[str],
    *,
    positional: str = "",
    config_file_needed: bool = True,
) -> None:
    """Parses a door's flags, those of a --config included.

    Args:
        door: For the sentences.
        flag_values: Holds the door's definitions; afterwards, its values.
        arguments: As the user typed them, behind the door.
        positional: The flag whose value may also stand alone, without ``--name=``; one that may be repeated takes all
            that stands alone.
        config_file_needed: Whether a door with --config must be given one, or the defaults serve.

    Raises:
        UserError: A flag that does not exist or has a wrong value, or something that is no flag.
    """
    own = own_flags(flag_values)
    if "config" in own:
        # ml_collections is needed by one door alone.
        from spt_jax.commands.configuration import attach_config

        _refuse_unknown(door, own, arguments)
        arguments = attach_config(flag_values, arguments, file_needed=config_file_needed)
    try:
        rest = flag_values([f"spt-jax {door}", *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown(door, error.flagname, own)) from error
    except (flags.Error, ValueError) as error:
        raise UserError(_sentence(flag_values, arguments, error)) from error
    if rest and positional and isinstance(flag_values[positional], flags.MultiFlag):
        flag_values[positional].parse(rest)
        rest = []
    if rest and positional and not flag_values[positional].present:
        flag_values[positional].parse(rest.pop(0))
    if rest:
        if positional:
            raise UserError(f"{door} takes one {positional.upper()}, and {rest[0]!r} is another")
        raise UserError(f"{rest[0]!r} is not a flag of {door}; flags are written --name=value")


def own_flags(flag_values: flags.FlagValues) -> dict[str, flags.Flag]:
    """The flags that a door defined, in its order; absl's own are not among them."""
    return {
        flag.name: flag
        for module, defined in flag_values.flags_by_module_dict().items()
        if module.startswith("spt_jax")
        for flag in defined
    }


def door_help(description: str, groups: Mapping[str, flags.FlagValues]) -> str:
    """A door's docstring and its flags with their defaults, under the heading of each group."""
    parts = [description.strip()]
    for heading, flag_values in groups.items():
        lines = [f"{heading}:"]
        for name, flag in own_flags(flag_values).items():
            text = " ".join((flag.help or "").split())
            default = flag.default
            if flag.boolean:
                name, text = f"[no]{name}", f"{text} (default: {str(default).lower()})"
            elif default not in (None, "", []):
                text = f"{text} (default: {default})"
            lines += [f"  --{name}", textwrap.indent(textwrap.fill(text, 110), "      ")]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _refuse_unknown(door: str, own: dict[str, flags.Flag], arguments: Sequence[str]) -> None:
    """A misspelt flag is told before a config file is looked for."""
    known = {"config", "noconfig", "flagfile", "", *own, *(f"no{name}" for name, flag in own.items() if flag.boolean)}
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0]
        if argument.startswith("--") and name.partition(".")[0] not in known:
            raise UserError(_unknown(door, name, own))


def _unknown(door: str, name: str, own: dict[str, flags.Flag]) -> str:
    return f"there is no flag --{name} for {door}.{nearest(f'--{name}', [f'--{flag}' for flag in own])}"


def _sentence(flag_values: flags.FlagValues, arguments: Sequence[str], error: Exception) -> str:
    """One sentence for what absl raised."""
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        if name not in flag_values or f"--{name}" not in str(error):
            continue
        flag = flag_values[name]
        if not equals and "issing value" in str(error):
            return f"--{name} needs a value, as in --{name}=value"
        allowed = getattr(flag.parser, "enum_values", None)
        if allowed:
            return f"--{name} is {value!r}; allowed: {', '.join(allowed)}.{nearest(value, allowed)}"
        kind = _KINDS.get(flag.flag_type(), f"a value of type {flag.flag_type()}")
        lowest, highest = (getattr(flag.parser, bound, None) for bound in ("lower_bound", "upper_bound"))
        if lowest is not None:
            bounds = [f"{bound:g}" if isinstance(bound, float) else str(bound) for bound in (lowest, highest)]
            kind += f", {lowest} or more" if highest is None else f" from {bounds[0]} to {bounds[1]}"
        return f"--{name} is {value!r}; allowed: {kind}"
    return " ".join(str(error).split())
