"""A NIXL agent over UCX that an experiment drives: one JSON object a line in, one out. Two of them are a pair: one has
memory, the other moves blocks to and from it and measures. The process ends when its input does.

UCX takes its transports from UCX_TLS. The transfers of a batch are prepared once and posted again and again, which is the
fastest way that NIXL has; what Python costs on top is a call to post and one to look.
"""

import base64
import ctypes
import json
import mmap
import sys
import time


class Agent:
    def start(self, name, length, progress):
        global bindings
        from nixl_cu12 import _bindings as bindings
        from nixl_cu12 import nixl_agent, nixl_agent_config

        self.nixl = nixl_agent(name, nixl_agent_config(enable_prog_thread=progress, backends=["UCX"]))
        self.mapping = mmap.mmap(-1, length)
        self.mapping[:] = bytes(range(1, 251)) * (length // 250) + bytes(length % 250)
        self.addr = ctypes.addressof(ctypes.c_char.from_buffer(self.mapping))
        if not self.nixl.register_memory([(self.addr, length, 0, "")], "DRAM"):
            raise RuntimeError("the memory cannot be registered")
        metadata = self.nixl.get_agent_metadata()
        return {"addr": self.addr, "metadata": base64.b64encode(metadata).decode()}

    def connect(self, metadata):
        self.peer = self.nixl.add_remote_agent(base64.b64decode(metadata))
        self.peer = self.peer.decode() if isinstance(self.peer, bytes) else self.peer
        return {}

    def measure(self, op, remote, block, stride, batch, seconds):
        """Batches one after the other for so long: how many, in what time, and the median of each one's time in ns."""
        places = range(0, batch * stride, stride)
        local = self.nixl.get_xfer_descs([(self.addr + at, block, 0) for at in places], "DRAM")
        far = self.nixl.get_xfer_descs([(remote + at, block, 0) for at in places], "DRAM")
        request = self.nixl.initialize_xfer(op.upper(), local, far, self.peer)
        handle, agent = request._handle, self.nixl.agent
        post, look, busy = agent.postXferReq, agent.getXferStatus, bindings.NIXL_IN_PROG
        now, times = time.perf_counter_ns, []
        until = began = now()
        until += int(seconds * 1e9)
        while (before := now()) < until:
            status = post(handle)
            while status == busy:
                status = look(handle)
            if status != bindings.NIXL_SUCCESS:
                raise RuntimeError(f"NIXL says {status}")
            times.append(now() - before)
        elapsed = now() - began
        request.release()
        times.sort()
        return {"batches": len(times), "seconds": elapsed / 1e9, "p50_ns": times[len(times) // 2]}


def main():
    agent = Agent()
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(agent, request.pop("do"))(**request)
        # The libraries may print to stdout: ours are the lines that begin so.
        print("\n= " + json.dumps(answer), flush=True)


main()
