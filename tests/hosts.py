"""Two hosts on this machine: network namespaces with a link between them that can be cut, and names of their own. They
share the disk, the processes and the users of the machine.

    with TwoHosts() as hosts:
        hosts.start(0, "ping", hosts.ADDRESSES[1])
        hosts.cut(); hosts.connect()  # as if somebody had pulled the cable, and plugged it in again

`python -m tests.hosts` installs what they need, from Debian's packages. Nothing is written outside the namespaces, which
end with the process that has made them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

from tests.slurm import PATH, install_packages

PACKAGES = ("iproute2", "util-linux")
PROGRAMS = ("ip", "unshare", "nsenter")
NAMESPACES = ("--net", "--uts", "--mount")  # the last one for /etc/hosts
LINK = "link0"  # name of the interface on each host
# makes the namespaces, and keeps them until its standard input is closed
HOLD = """
echo {name} > /proc/sys/kernel/hostname
ip link set lo up
names=$(mktemp)
printf '{names}' > $names
mount --bind $names /etc/hosts
rm $names
echo ready
exec cat
"""


def missing() -> str:
    """Why no hosts can be made here, or ""."""
    if absent := [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]:
        return f"{', '.join(absent)} is not installed; on Debian, as root, `make slurm` installs it"
    made = subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True, text=True)
    return "" if made.returncode == 0 else f"network namespaces are not allowed ({made.stderr.strip()})"


class TwoHosts:
    """Both have an interface LINK, with these addresses."""

    NAMES = ("host1", "host2")
    ADDRESSES = ("10.77.0.1", "10.77.0.2")

    def __enter__(self) -> TwoHosts:
        self.holders: list[subprocess.Popen] = []
        try:
            pairs = [("127.0.0.1", "localhost"), *zip(self.ADDRESSES, self.NAMES, strict=True)]
            names = "".join(f"{address} {name}\\n" for address, name in pairs)
            for name in self.NAMES:
                words = ["unshare", *NAMESPACES, "sh", "-ec", HOLD.format(name=name, names=names)]
                holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"PATH": PATH})
                self.holders.append(holder)
                assert holder.stdout is not None and holder.stdout.readline() == b"ready\n", name
            peer = ["peer", "name", LINK, "netns", str(self.holders[1].pid)]
            self.run(0, "ip", "link", "add", LINK, "type", "veth", *peer)
            for number, address in enumerate(self.ADDRESSES):
                self.run(number, "ip", "address", "add", f"{address}/24", "dev", LINK)
                self.run(number, "ip", "link", "set", LINK, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for holder in self.holders:
            holder.kill()
            holder.communicate()

    def words(self, number: int, *command: object) -> list[str]:
        """The words that run a command on a host."""
        holder = ["nsenter", "--target", str(self.holders[number].pid), *NAMESPACES, f"--wd={os.getcwd()}"]
        return [*holder, *map(str, command)]

    def run(self, number: int, *command: object) -> None:
        """Run a command on a host, and wait for it."""
        subprocess.run(self.words(number, *command), check=True, env={"PATH": PATH})

    def start(self, number: int, *command: object, **options: Any) -> subprocess.Popen:
        """Start a command on a host. `options`: those of Popen."""
        return subprocess.Popen(self.words(number, *command), **options)

    def cut(self) -> None:
        """Cut the link: packets are lost, and no connection is closed."""
        self.run(1, "ip", "link", "set", LINK, "down")

    def connect(self) -> None:
        """End `cut`."""
        self.run(1, "ip", "link", "set", LINK, "up")


if __name__ == "__main__":
    if not all(shutil.which(name, path=PATH) for name in PROGRAMS):
        install_packages(PACKAGES, "tests of lost networks")
    if reason := missing():
        print(f"tests of lost networks will be SKIPPED: {reason}", flush=True)
        sys.exit(0)
