"""A stock Mooncake node that a test drives: one JSON object a line in, one out, by its own input and output or, with an
address and a port as arguments, by the one connection it accepts there. Its engine logs to stderr.

Memory is filled from files and compared with files, so that what is expected is known by the test alone, and what is
there is seen by this process itself. The process ends when its input does.
"""

import ctypes
import json
import mmap
import os
import queue
import signal
import socket
import sys
import threading
import time

STATUS = {1: "done", -1: "failed", -2: "timeout"}


class Node:
    def __init__(self):
        self.memory = {}  # address -> the mapping that must outlive its registration

    def start(self, name, metadata, protocol="tcp", devices="", variables={}):
        os.environ.update(variables)  # some are read when the library is loaded
        global mooncake
        import mooncake.engine

        self.engine = mooncake.engine.TransferEngine()
        rc = self.engine.initialize(name, metadata, protocol, devices)
        return {"rc": rc, "rpc_port": self.engine.get_rpc_port() if rc == 0 else 0}

    def register(self, length, location="*", touch=True):
        mapping = mmap.mmap(-1, length)
        if touch:
            mapping[:] = bytes(length)
        addr = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        rc = self.engine.register_memory(addr, length, location)
        if rc == 0:
            self.memory[addr] = mapping
        return {"rc": rc, "addr": addr}

    def unregister(self, addr):
        return {"rc": self.engine.unregister_memory(addr)}

    def load(self, addr, file):
        with open(file, "rb") as source:
            data = source.read()
        ctypes.memmove(addr, data, len(data))
        return {}

    def compare(self, addr, file):
        """First offset that differs from the file, None if none does."""
        with open(file, "rb") as source:
            wanted = source.read()
        seen = ctypes.string_at(addr, len(wanted))
        if seen == wanted:
            return {"differs": None}
        return {"differs": next(i for i, (a, b) in enumerate(zip(seen, wanted)) if a != b)}

    def first(self, segment):
        return {"addr": self.engine.get_first_buffer_address(segment)}

    def transfer(self, segment, op, moves, notify=None):
        """One batch of [local, remote, length], waited for."""
        local, remote, lengths = (list(column) for column in zip(*moves))
        opcodes = mooncake.engine.TransferOpcode
        opcode = opcodes.Write if op == "write" else opcodes.Read
        note = mooncake.engine.TransferNotify(*notify) if notify else None
        began = time.monotonic()
        rc = self.engine.batch_transfer_sync(segment, local, remote, lengths, opcode, note)
        return {"rc": rc, "seconds": time.monotonic() - began}

    def mix(self, segment, local, remote, length, block, seconds):
        """WRITEs `block` after `block` of the local memory to the peer and READs it back into the half beside it, each
        round compared, until the time is over. Stops at the first failure."""
        half, until, rounds = length // 2, time.monotonic() + seconds, 0
        blocks = range(0, half - block + 1, block)
        moves = [(local + at, remote + at, block) for at in blocks]
        back = [(local + half + at, remote + at, block) for at in blocks]
        while time.monotonic() < until:
            rounds += 1
            fresh = rounds.to_bytes(4, "little") * (half // 4)
            ctypes.memmove(local, fresh, len(fresh))
            for op, batch in (("write", moves), ("read", back)):
                rc = self.transfer(segment, op, batch)["rc"]
                if rc != 0:
                    return {"rc": rc, "rounds": rounds, "op": op}
            size = len(blocks) * block
            if ctypes.string_at(local + half, size) != fresh[:size]:
                return {"rc": 0, "rounds": rounds, "wrong": True}
        return {"rc": 0, "rounds": rounds, "wrong": False}

    def submit(self, segment, local, remote, length):
        """One WRITE, not waited for."""
        return {"id": self.engine.transfer_submit_write(segment, local, remote, length)}

    def status(self, id):
        return {"status": STATUS.get(self.engine.transfer_check_status(id), "pending")}

    def probe(self, segment):
        return {"rc": self.engine.send_probe(segment)}

    def notifies(self):
        return {"notifies": [[n.name, n.msg] for n in self.engine.get_notifies()]}

    def topology(self, variables={}):
        """What an engine would find here; the engine makes one for the purpose, so variables count anew."""
        os.environ.update(variables)
        return {"topology": json.loads(self.engine.get_local_topology())}


def listen(source, commands):
    """A call of the engine may never return: who drives us can end us all the same."""
    for line in source:
        request = json.loads(line)
        if request["do"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        commands.put(request)
    commands.put(None)
    time.sleep(20)
    os.kill(os.getpid(), signal.SIGKILL)


def main():
    source, sink = sys.stdin, sys.stdout
    if len(sys.argv) > 1:
        with socket.create_server((sys.argv[1], int(sys.argv[2]))) as server:
            connection, _ = server.accept()
        source, sink = connection.makefile("r"), connection.makefile("w")
    commands = queue.Queue()
    threading.Thread(target=listen, args=(source, commands), daemon=True).start()
    node = Node()
    while (request := commands.get()) is not None:
        number = request.pop("number")
        answer = getattr(node, request.pop("do"))(**request)
        answer["number"] = number
        # The engine's own libraries may print to stdout: ours are the lines that begin so.
        print("\n= " + json.dumps(answer), file=sink, flush=True)


main()
