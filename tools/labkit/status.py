"""What is in the cache, what is missing, which accelerator was proved."""

import os
from typing import Any

from labkit import accelerator, cache, host, kernel
from labkit.cache import size
from labkit.session import Session

SCHEMA = "pyvhostvdpa/lab-status/1"


def collect(session: Session) -> dict[str, Any]:
    """Return the state of everything, as plain data."""
    tree, environment = session.tree, session.environment
    verdict = accelerator.remembered(session.cache)
    return {
        "schema": SCHEMA,
        "cache": {"path": str(session.cache.root), "bytes": cache.used(session.cache.root)},
        "host_packages_missing": host.missing_packages(),
        "tree": {"ready": tree.ready, "identity": tree.identity(), "bytes": cache.used(tree.folder)},
        "kernels": [
            {"release": one.release, "version": one.version, "bytes": cache.used(one.folder)}
            for one in kernel.cached(session.cache)
        ],
        "environment": {"ready": environment.ready, "exists": environment.exists, "identity": environment.identity()},
        "accelerator": {"mode": verdict.mode, "why": verdict.why} if verdict else None,
        "interrupted": [path.name for path in cache.leftovers(session.cache.root)],
    }


def render(state: dict[str, Any]) -> str:
    """Return the same for humans."""
    lines = [f"cache        {state['cache']['path']}, {size(state['cache']['bytes'])}"]
    missing = state["host_packages_missing"]
    lines.append(
        "host         " + (f"lacks the packages {' '.join(missing)}" if missing else "has the packages it needs")
    )
    tree = state["tree"]
    lines.append(f"tree         {tree['identity']}, " + (size(tree["bytes"]) if tree["ready"] else "not built"))
    for one in state["kernels"]:
        lines.append(f"kernel       {one['release']} (package {one['version']}), {size(one['bytes'])}")
    if not state["kernels"]:
        lines.append("kernel       none")
    environment = state["environment"]
    built = (
        "built" if environment["ready"] else "to be built" if environment["exists"] else "the project has no package"
    )
    lines.append(f"project      {environment['identity']}, {built}")
    verdict = state["accelerator"]
    said = accelerator.describe(accelerator.Verdict(**verdict)) if verdict else "not tried yet"
    lines.append(f"accelerator  {said}")
    for name in state["interrupted"]:
        lines.append(f"interrupted  {name} (the next set-up redoes it)")
    if missing or not tree["ready"] or not state["kernels"]:
        lines.append("next         tools/lab setup" if os.geteuid() == 0 else "next         sudo tools/lab setup")
    return "\n".join(lines)
