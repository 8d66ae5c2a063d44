"""Kinds of devices that the lab can make, and the reading of `--devices KIND:N[,option=value…]`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from labkit.errors import LabError

DEFAULT = "vdpa_sim_net:2"
FIRST_MAC = 0x525491A1B2C1
VDPA_ATTRIBUTES = frozenset({"mac", "mtu", "max_vqp", "device_features"})


@dataclass(frozen=True)
class Kind:
    """A kind of vDPA device: the modules that make it, and how one is added.

    `daemon` is a script of the project that plays the devices, given NAME=MAC for each, before they are added; it
    returns once they can be.
    """

    name: str
    modules: tuple[str, ...]
    management_device: str
    parameters: Mapping[str, str]
    attributes: frozenset[str] = VDPA_ATTRIBUTES
    has_mac: bool = False
    source: str = ""
    daemon: str = ""

    def project_source(self, project: Path) -> Path | None:
        """Return the folder of the project that holds the module, if the project has it."""
        return project / self.source if self.source else None


_SIM = dict.fromkeys(("use_va", "batch_mapping", "max_iotlb_entries"), "vdpa_sim")
_HWSIM = dict.fromkeys(
    (
        *("nas", "single_group", "dma_map", "identity", "suspend", "resume", "enable_after_driver_ok", "desc_asid"),
        *("persist", "clean_map", "vq_size", "ring_max", "doorbell_us", "base_avail", "inflight", "inflight_us"),
        *("reorder", "resume_cvq", "indirect_in_data", "filter", "wire", "extra_features", "cost_profile"),
        *("mem_scale", "scale_min", "heavy_min"),
    ),
    "vdpa_hwsim",
)
KINDS = {
    kind.name: kind
    for kind in (
        Kind("vdpa_sim_net", ("vdpa_sim", "vdpa_sim_net"), "vdpasim_net", _SIM, has_mac=True),
        Kind(
            "vdpa_sim_blk",
            ("vdpa_sim", "vdpa_sim_blk"),
            "vdpasim_blk",
            {**_SIM, "shared_backend": "vdpa_sim_blk"},
            frozenset({"device_features"}),
        ),
        Kind("vduse", ("vduse",), "vduse", {}, frozenset({"mac"}), has_mac=True, daemon="tools/vduse_net.py"),
        Kind("vdpa_hwsim", ("vdpa_hwsim",), "vdpa_hwsim", _HWSIM, has_mac=True, source="tools/vdpa_hwsim"),
    )
}


@dataclass(frozen=True)
class Group:
    """Some devices of one kind with the same options."""

    kind: Kind
    count: int
    parameters: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DevicePlan:
    """All devices of a VM: modules in the order to load them, and the devices in the order to add them."""

    groups: Sequence[Group]

    @property
    def count(self) -> int:
        """Return how many devices there will be."""
        return sum(group.count for group in self.groups)

    def modules(self) -> list[tuple[str, list[str]]]:
        """Return modules with their parameters."""
        loads: dict[str, dict[str, str]] = {}
        for group in self.groups:
            for module in group.kind.modules:
                mine = loads.setdefault(module, {})
                for name, value in group.parameters.items():
                    if group.kind.parameters[name] == module:
                        _agree(module, name, mine.setdefault(name, value), value)
        return [(module, [f"{name}={value}" for name, value in mine.items()]) for module, mine in loads.items()]

    def additions(self) -> list[list[str]]:
        """Return the arguments of `vdpa dev add`, one list per device."""
        result: list[list[str]] = []
        for name, group, mac in self._named():
            words = ["name", name, "mgmtdev", group.kind.management_device]
            if not group.kind.daemon:
                words += ["mac", mac] if mac else []
                words += [word for key, value in group.attributes.items() if key != "mac" for word in (key, value)]
            result.append(words)
        return result

    def daemons(self) -> list[list[str]]:
        """Return the commands that play devices, each with NAME=MAC of those that it plays."""
        played: dict[str, list[str]] = {}
        for name, group, mac in self._named():
            if group.kind.daemon:
                played.setdefault(group.kind.daemon, []).append(f"{name}={mac}")
        return [["python3", script, "--background", *words] for script, words in played.items()]

    def _named(self) -> Iterator[tuple[str, Group, str]]:
        """Yield each device's name, group, and MAC address, "" for one that has none."""
        number, mac = 0, FIRST_MAC
        for group in self.groups:
            own_mac = parse_mac(group.attributes["mac"]) if "mac" in group.attributes else None
            for position in range(group.count):
                if own_mac is not None:
                    text = format_mac(own_mac + position)
                else:
                    text = format_mac(mac) if group.kind.has_mac else ""
                    mac += group.kind.has_mac
                yield f"vdpa{number}", group, text
                number += 1


def _agree(module: str, name: str, first: str, second: str) -> None:
    if first != second:
        raise LabError(
            f"--devices asks for {module} with {name}={first} and with {name}={second}",
            f"{name} is a parameter of the module {module}, which is loaded once for all its devices.",
            "give the same value to both kinds of devices",
        )


def parse(specifications: Sequence[str]) -> DevicePlan:
    """Read the values of `--devices`. A kind with 0 devices has its module loaded, for those made later."""
    return DevicePlan([_group(text) for text in specifications or [DEFAULT] if text != "none"])


def _group(text: str) -> Group:
    head, *options = text.split(",")
    name, _, count = head.partition(":")
    kind = KINDS.get(name)
    if kind is None:
        raise LabError(
            f"--devices {text}: there is no kind of device called {name!r}",
            f"Known kinds: {', '.join(KINDS)}.",
            f"tools/lab run --devices {DEFAULT} -- vdpa dev show",
        )
    if not re.fullmatch(r"\d{1,2}", count or "1"):
        raise LabError(
            f"--devices {text}: {count!r} is not a number of devices from 0 to 99 (0 loads the modules)",
            "",
            f"--devices {name}:2",
        )
    parameters, attributes = {}, {}
    for option in options:
        key, _, value = option.partition("=")
        if key in kind.parameters and value:
            parameters[key] = value
        elif key in kind.attributes and value:
            attributes[key] = value
        else:
            raise LabError(
                f"--devices {text}: {option!r} is not an option of {name}",
                f"Module parameters: {', '.join(sorted(kind.parameters)) or 'none'}.\n"
                f"Attributes of `vdpa dev add`: {', '.join(sorted(kind.attributes)) or 'none'}.",
                f"write options as {name}:2,name=value",
            )
    if "mac" in attributes:
        parse_mac(attributes["mac"])
    return Group(kind, int(count or 1), parameters, attributes)


def parse_mac(text: str) -> int:
    """Return a MAC address as a number."""
    if not re.fullmatch(r"([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}", text):
        raise LabError(f"--devices: {text!r} is not a MAC address", "", "write it as 52:54:91:a1:b2:c1")
    return int(text.replace(":", ""), 16)


def format_mac(value: int) -> str:
    """Return a number as a MAC address."""
    return value.to_bytes(6, "big").hex(":")
