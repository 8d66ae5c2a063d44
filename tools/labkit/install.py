"""The README's section "Install" as a test: its commands, word by word, on bare Debian trees."""

import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from labkit.bare import BARE, BareTree, Recipe
from labkit.cache import building
from labkit.errors import LabError
from labkit.package import Packager, version
from labkit.report import Case
from labkit.session import PROJECT, Session

SECTION = re.compile(r"^## Install\n(.*?)^## ", re.MULTILINE | re.DOTALL)
PACKAGE = "tools/package "
LIMIT_S = 600.0
# What pip would fetch: what the package needs, and what building it from source needs.
WHEELS = ("cffi>=1.17", "ioctl-opt", "psutil", "pycparser", "setuptools>=77", "wheel", "packaging")
PYTHONS = ("3.11", "3.13")
# On a bare machine: no device, no module loaded, and doctor shows that by its exit status.
_AFTERWARDS = r"""
cd /
test "$(vhost-vdpa --version)" = "vhost-vdpa {version}"
vhost-vdpa > /tmp/help && grep -q '^usage: vhost-vdpa' /tmp/help
vhost-vdpa list > /tmp/list 2> /tmp/list-says; cat /tmp/list-says
grep -q 'no vDPA device\|no vDPA bus' /tmp/list-says || test -s /tmp/list
vhost-vdpa doctor > /tmp/doctor || test $? = 1; head -1 /tmp/doctor
vhost-vdpa doctor --json > /tmp/doctor.json || test $? = 1; python3 -m json.tool /tmp/doctor.json > /dev/null
vhost-vdpa help migrate > /tmp/migrate && grep -q 'exit status' /tmp/migrate
"""
# Of the Debian package: what belongs to a command of the system.
_OF_THE_SYSTEM = r"""
apt-get install man-db bash-completion > /tmp/apt 2>&1
for page in vhost-vdpa vhost-vdpa-migrate vhost-vdpa-dev-add; do
    man $page > /tmp/page && grep -q '^EXIT STATUS' /tmp/page && grep -q '^SYNOPSIS' /tmp/page
done
test -z "$(MANWIDTH=80 man --warnings vhost-vdpa-migrate 2>&1 >/dev/null)"
: > /dev/vhost-vdpa-7   # stands for a device: completion looks at names only
cat > /tmp/complete <<'SCRIPT'
. /usr/share/bash-completion/bash_completion
. /usr/share/bash-completion/completions/vhost-vdpa
complete_words() {
    COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE} COMPREPLY=()
    $(complete -p vhost-vdpa | sed 's/.*-F \([^ ]*\).*/\1/') vhost-vdpa "${COMP_WORDS[COMP_CWORD]}" ''
    printf '%s\n' "${COMPREPLY[@]}"
}
complete_words vhost-vdpa probe /dev/vh | grep -x /dev/vhost-vdpa-7
complete_words vhost-vdpa migrate /dev/vhost-vdpa-7 /dev/ | grep -x /dev/vhost-vdpa-7
complete_words vhost-vdpa do | grep -x doctor
complete_words vhost-vdpa migrate --mem | grep -x -- --memory
SCRIPT
bash /tmp/complete
dpkg --audit
apt-get purge python3-pyvhostvdpa > /tmp/apt 2>&1
test ! -e /usr/bin/vhost-vdpa
"""


# What others read of `vhost-vdpa facts`: its help has the commands.
_READ = r"""
apt-get install ansible-core prometheus-node-exporter > /tmp/apt 2>&1
mkdir -p /etc/ansible/facts.d /tmp/metrics
vhost-vdpa facts --help | grep '^  cd\|^  printf\|^  chmod' > /tmp/facts && sh -ex /tmp/facts
ansible localhost -c local -m setup -a filter=ansible_local > /tmp/ansible
grep -q '"schema": "pyvhostvdpa/facts/1"' /tmp/ansible && grep -q '"healthy"' /tmp/ansible
vhost-vdpa facts --openmetrics --output /tmp/metrics/vhost_vdpa.prom
options="--collector.disable-defaults --collector.textfile --collector.textfile.directory=/tmp/metrics"
prometheus-node-exporter $options --web.listen-address=127.0.0.1:39100 > /tmp/exporter 2>&1 &
exporter=$!
python3 - <<'SCRIPT'
import time, urllib.request
for attempt in range(100):
    try:
        text = urllib.request.urlopen("http://127.0.0.1:39100/metrics").read().decode()
        break
    except OSError:
        time.sleep(0.1)
assert "node_textfile_scrape_error 0" in text, text
assert 'vhost_vdpa_doctor_check{check="kernel modules",id="K01"}' in text, text
SCRIPT
kill $exporter
"""


# libvirt checks the XML in `vhost-vdpa help serve`, with its driver for tests, which needs no daemon.
_DEFINED = r"""
apt-get install libvirt-clients > /tmp/apt 2>&1
python3 - > /tmp/served.xml <<'SCRIPT'
import subprocess, textwrap
page = subprocess.run(["vhost-vdpa", "help", "serve"], capture_output=True, text=True, check=True).stdout
block = page.split("With libvirt:\n\n")[1].split("\n\n")[0]
system = "<os><type arch='x86_64' machine='q35'>hvm</type></os>"
print(f"<domain type='qemu'><name>served</name><memory unit='GiB'>1</memory><vcpu>1</vcpu>{system}")
print(textwrap.dedent(block) + "</domain>")
SCRIPT
virsh -c test:///default "define /tmp/served.xml --validate; dumpxml served" > /tmp/defined
grep -q "interface type='vhostuser'" /tmp/defined
sed 's/vhostuser/vhostless/' /tmp/served.xml > /tmp/wrong.xml
if virsh -c test:///default define /tmp/wrong.xml --validate; then exit 1; fi
"""


@dataclass(frozen=True)
class Way:
    """One block of commands: a way to install."""

    name: str
    commands: tuple[str, ...]

    @property
    def packages(self) -> list[str]:
        """What `tools/package` is asked to make."""
        return [word for line in self.commands if line.startswith(PACKAGE) for word in line.split()[1:]]

    def script(self, recipe: Recipe) -> str:
        """Return what is run in a bare tree of this recipe."""
        lines = [line for line in self.commands if not line.startswith(PACKAGE)]
        packaged = any(".deb" in line for line in lines)
        read = _READ if packaged and "ansible-core" in recipe.downloaded else ""
        defined = _DEFINED if packaged and "libvirt-clients" in recipe.downloaded else ""
        system = _OF_THE_SYSTEM if packaged else ""
        return "\n".join(["set -e", *lines, _AFTERWARDS.replace("{version}", version()), read, defined, system])


def ways(readme: str) -> list[Way]:
    """Return the ways to install that the README shows: its indented blocks."""
    found = SECTION.search(readme)
    if found is None:
        raise LabError('the README has no section "Install"', "", "write one: its commands are what is tested")
    blocks = re.findall(r"(?:^    .*\n)+", found[1], re.MULTILINE)
    each = [tuple(re.sub(r"\s+# .*", "", line).strip() for line in block.splitlines()) for block in blocks]
    return [Way(next(w for w in ("deb", "whl", "pip install .") if w in " ".join(c)), c) for c in each]


class Trial:
    """The trees, and what is installed in them."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.ways = ways((PROJECT / "README.md").read_text())
        self.trees = [BareTree(session.cache, session.progress, recipe) for recipe in BARE]
        self.packager = Packager(session, session.cache.bare / "dist")
        self.wheels = self.packager.tree.folder / "wheels"

    def set_up(self) -> None:
        """Make the trees, and fetch what pip would fetch."""
        self.packager.set_up()
        with self.session.cache.setting_up():
            for tree in self.trees:
                tree.ensure()
            if not self.wheels.exists():
                with building(self.wheels) as partial:
                    for python in PYTHONS:
                        self._fetch(partial, python)

    def _fetch(self, folder: Path, python: str) -> None:
        argv = ["python3", "-m", "pip", "download", "--only-binary=:all:", "--no-deps", f"--python-version={python}"]
        argv += ["--disable-pip-version-check", "--no-cache-dir", "--dest", "/lab/wheels", *WHEELS]
        chroot = self.packager.tree.chroot({folder: "/lab/wheels"}, {}, network=True)
        log = self.session.cache.log("install-wheels")
        self.session.progress.call(f"fetching wheels for Python {python}", chroot.argv(argv), log)

    def execute(self) -> Iterator[Case]:
        """Build what the README has built, install it in every tree in every way; make the site."""
        begin = time.monotonic()
        shutil.rmtree(self.packager.out, ignore_errors=True)
        made = {"sdist": self.packager.sdist, "wheel": lambda: self.packager.wheels(["x86_64"])}
        builders: dict[str, Callable[[], Sequence[Path]]] = {**made, "deb": self.packager.debs}
        wanted = dict.fromkeys(word for way in self.ways for word in way.packages)
        try:
            for word in wanted:
                builders[word]()
        except LabError as error:
            yield Case("tools/package", "failed", time.monotonic() - begin, error.render())
            return
        yield Case(f"tools/package {' '.join(wanted)}", "passed", time.monotonic() - begin)
        with ThreadPoolExecutor(max_workers=len(self.trees)) as pool:
            for cases in pool.map(lambda tree: [self._try(tree, way) for way in self.ways], self.trees):
                yield from cases
        yield self._site()

    def _site(self) -> Case:
        """Make the documentation's site, in which a warning or a dead link is an error."""
        begin = time.monotonic()
        try:
            self.packager.site()
        except LabError as error:
            return Case("tools/package site", "failed", time.monotonic() - begin, error.render())
        return Case("tools/package site", "passed", time.monotonic() - begin)

    def _try(self, tree: BareTree, way: Way) -> Case:
        name = f"{tree.recipe.title}: {way.name}"
        begin = time.monotonic()
        binds = {PROJECT: "/lab/project", self.packager.out: "/lab/project/dist", self.wheels: "/lab/wheels"}
        (PROJECT / "dist").mkdir(exist_ok=True)
        environment = {"DEBIAN_FRONTEND": "noninteractive", "PIP_FIND_LINKS": "/lab/wheels", "PIP_NO_INDEX": "1"}
        environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
        chroot = tree.chroot(binds, environment, "/lab/project", network=True)
        argv = ["setpriv", "--pdeathsig", "KILL", *chroot.argv(["sh", "-ec", f"set -x\n{way.script(tree.recipe)}"])]
        try:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=LIMIT_S
            )
        except subprocess.TimeoutExpired:
            return Case(name, "failed", LIMIT_S, f"took longer than {LIMIT_S:g} s: {shlex.join(way.commands)}")
        said = f"{done.stdout}\n{done.stderr}"
        result = "passed" if done.returncode == 0 else "failed"
        return Case(name, result, time.monotonic() - begin, "" if done.returncode == 0 else said)
