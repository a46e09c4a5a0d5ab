"""Reads or writes one key of an etcd by its HTTP gateway: etcd.py URL get KEY, etcd.py URL put KEY VALUE."""

import base64
import json
import sys
import urllib.request


def text(data):
    return base64.b64encode(data.encode()).decode()


url, verb, key, *value = sys.argv[1:]
body = {"key": text(key)} | ({"value": text(value[0])} if value else {})
request = urllib.request.Request(f"{url}/v3/kv/{'put' if value else 'range'}", json.dumps(body).encode())
with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as reply:
    found = json.load(reply).get("kvs", [])
if verb == "get" and found:
    sys.stdout.write(base64.b64decode(found[0]["value"]).decode())
