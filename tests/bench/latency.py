# One request at a time for so many seconds: latency.py URI read|write BLOCK SECONDS
import json, os, random, sys, time
import nbd

uri, access, block, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
handle = nbd.NBD()
handle.set_uri_allow_local_file(True)
handle.connect_uri(uri)
blocks = handle.get_size() // block
data = os.urandom(block)
times = []
began = now = time.perf_counter()
while now - began < seconds:
    offset = random.randrange(blocks) * block
    start = time.perf_counter()
    if access == "read":
        handle.pread(block, offset)
    else:
        handle.pwrite(data, offset)
    now = time.perf_counter()
    times.append(now - start)
handle.shutdown()
times.sort()
print(json.dumps({
    "operations": len(times),
    "seconds": now - began,
    "p50": times[len(times) // 2] * 1e6,
    "p99": times[len(times) * 99 // 100] * 1e6,
}))
