# The demo on this machine, run by bash behind steps.sh: two processes, no RDMA NIC, no server, nothing to set up.
export MC_LOG_LEVEL=WARNING
BLOCKS=4KiB,64KiB,1MiB
notes=$(mktemp -d)
trap 'kill "${serve_pid:-}" 2> /dev/null || true; rm -rf "$notes"' EXIT

step "1. A process offers 64 MiB"
echo "\$ moonrail serve --fabrics shm,tcp --verify"
"$MOONRAIL_BIN" serve --fabrics shm,tcp --verify > "$notes/serve.out" 2> "$notes/serve.err" &
serve_pid=$!
serving_or_gone() { grep -q '^listening on' "$notes/serve.out" || ! kill -0 "$serve_pid"; }
until_true 20 "moonrail serve said nothing in 20 s" serving_or_gone
show < "$notes/serve.out"
grep -q '^listening on' "$notes/serve.out" || { show < "$notes/serve.err"; give_up "moonrail serve ended at once"; }
name=$(sed -n 's/^listening on //p' "$notes/serve.out")

step "2. Another process opens it by that name. Both run on this host, so the bytes go through shared memory"
run "$MOONRAIL_BIN" bench "$name" --fabrics shm,tcp --op both --block "$BLOCKS" --batch 16 --iterations 40 --verify --ask-target

step "3. The same over TCP, as between two hosts without RDMA: Mooncake's data protocol"
run "$MOONRAIL_BIN" bench "$name" --fabrics shm,tcp --require tcp --op both --block "$BLOCKS" --batch 16 --iterations 40 \
  --verify --ask-target

step "4. The first process stops"
kill -TERM "$serve_pid"
wait "$serve_pid" || { show < "$notes/serve.err"; give_up "moonrail serve ended with status $?"; }
show < "$notes/serve.err"
echo "    exit status 0"
