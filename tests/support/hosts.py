"""Hosts on one machine: each in a network of its own on one bridge, with a name and a directory that no other sees."""

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from micro import LIMIT_SECONDS

NETWORK, BRIDGE = "10.77.0", "elastic0"
GATEWAY = f"{NETWORK}.1"  # this machine, to the hosts


@dataclass(frozen=True)
class Host:
    """A host; `state` is a directory in memory, at the same path on all hosts, and another one on each."""

    name: str
    address: str
    state: Path
    keeper: int

    def start(self, command: Sequence[str], environment: Mapping[str, str], **options: object) -> subprocess.Popen[str]:
        """A process on this host, which has these variables and no others."""
        enter = ["nsenter", f"--target={self.keeper}", "--mount", "--net", "--uts", f"--wdns={self.state}"]
        known = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS") if name in os.environ}
        environment = {**known, "HOME": str(self.state), **environment}
        return subprocess.Popen([*enter, *command], env=environment, text=True, **options)  # type: ignore[call-overload]

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        process = self.start(command, environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=LIMIT_SECONDS)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def kill(self) -> None:
        """End everything on this host at once, as a loss of power would; its disk stays."""
        while processes := self.processes():  # one may have just begun another
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    def lose(self) -> None:
        """Kill it, and empty its disk: what comes back is another host by its name."""
        self.kill()
        assert self.run(["find", str(self.state), "-mindepth", "1", "-delete"], {}).returncode == 0

    def processes(self, name: str = "") -> list[int]:
        """The processes that run here, or those whose command line has a name in it."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        running = set(map(int, listed.stdout.split())) - {self.keeper}
        return [process for process in running if name in _command(process)]

    def glob(self, pattern: str) -> list[Path]:
        """What its disk has now, as this machine sees it."""
        return list(Path(f"/proc/{self.keeper}/root{self.state}").glob(pattern))


def _command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def why_not() -> str:
    """Why there can be no hosts here; "" where there can."""
    if os.geteuid() != 0:
        return "networks of their own need root"
    if missing := [name for name in ("ip", "nsenter", "unshare", "mount") if shutil.which(name) is None]:
        return f"hosts of their own need {', '.join(missing)}"
    made = subprocess.run(["ip", "netns", "add", "elastic-probe"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", "elastic-probe"], capture_output=True)
    return made.stderr.strip()


@contextmanager
def three_hosts() -> Iterator[list[Host]]:
    """Hosts h1, h2 and h3, at 10.77.0.11 to 13, until the block ends and with it all that runs on them."""
    state = Path(tempfile.mkdtemp(prefix="h-", dir="/tmp"))  # short: the paths of sockets are at most 107 characters
    _clear()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, state)
        _ip("link", "add", BRIDGE, "type", "bridge")
        stack.callback(_ip, "link", "delete", BRIDGE)
        _ip("address", "add", f"{GATEWAY}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        yield [stack.enter_context(_host(number, state)) for number in (1, 2, 3)]


@contextmanager
def _host(number: int, state: Path) -> Iterator[Host]:
    name, address = f"h{number}", f"{NETWORK}.{10 + number}"
    _ip("netns", "add", name)
    try:
        _ip("link", "add", f"elastic-{name}", "type", "veth", "peer", "name", "e0", "netns", name)
        _ip("link", "set", f"elastic-{name}", "master", BRIDGE, "up")
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "e0")
        for device in ("lo", "e0"):
            _ip("-n", name, "link", "set", device, "up")
        names = "".join(f"{NETWORK}.{10 + other} h{other}\\n" for other in range(1, 4))
        known = f"printf '127.0.0.1 localhost\\n{names}' >{state}/hosts && mount --bind {state}/hosts /etc/hosts"
        keep = f"mount -t tmpfs tmpfs {state} && hostname {name} && {known} && echo ready && exec sleep infinity"
        command = ["ip", "netns", "exec", name, "unshare", "--mount", "--uts", "sh", "-c", keep]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as keeper:
            assert keeper.stdout is not None and keeper.stdout.readline() == "ready\n"
            host = Host(name=name, address=address, state=state, keeper=keeper.pid)
            try:
                yield host
            finally:
                host.kill()
                keeper.kill()
    finally:
        _ip("link", "delete", f"elastic-{name}")  # a namespace keeps its end for as long as a socket of it lingers
        _ip("netns", "delete", name)


def _clear() -> None:
    """Remove what tests that were killed have left."""
    links = [["link", "delete", device] for device in (BRIDGE, *(f"elastic-h{number}" for number in (1, 2, 3)))]
    for command in (*links, *(["netns", "delete", f"h{number}"] for number in (1, 2, 3))):
        subprocess.run(["ip", *command], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def reachable(port: int) -> Iterator[None]:
    """Let hosts reach what listens on this machine's own 127.0.0.1:port, at the same port of GATEWAY."""
    loop = asyncio.new_event_loop()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while sent := await reader.read(1 << 16):
                writer.write(sent)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        their_reader, their_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, their_writer), pump(their_reader, writer))

    server = loop.run_until_complete(asyncio.start_server(pass_on, GATEWAY, port))
    thread = threading.Thread(target=loop.run_forever, name="reachable", daemon=True)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
