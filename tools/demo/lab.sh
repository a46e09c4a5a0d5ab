# The demo on RDMA, run by bash behind steps.sh on both nodes of a 2 × 2 lab. Node 0 offers memory, node 1 moves bytes to
# and from it.
etcd=10.0.0.1:2379
notes=/lab/shared # what the nodes tell each other
READY=60          # seconds a process may take to start on an emulated node
export LAB_BARRIER_SECONDS=170 MC_LOG_LEVEL=WARNING
BLOCKS=4KiB,64KiB,1MiB

etcd_listens() { (exec 3<> "/dev/tcp/${etcd/://}"); }
sent() { cat "/sys/class/net/eth$1/statistics/tx_bytes"; }
received() { cat "/sys/class/net/eth$1/statistics/rx_bytes"; }

node_0() {
  step "1. The NICs of node 0, and which address each will use"
  run "$MOONRAIL_BIN" nics

  step "2. etcd, where nodes find each other, starts on node 0"
  etcd --data-dir /tmp/demo-etcd --listen-client-urls "http://$etcd" --advertise-client-urls "http://$etcd" \
    --listen-peer-urls http://127.0.0.1:2380 > /tmp/demo-etcd.log 2>&1 &
  etcd_pid=$! # not local: the trap runs after this function
  trap 'kill "$etcd_pid" "${serve_pid:-$etcd_pid}" 2> /dev/null || true' EXIT
  until_true "$READY" "etcd did not listen on $etcd: $(tail -3 /tmp/demo-etcd.log)" etcd_listens

  step "3. Node 0 registers 32 MiB on both NICs and offers it"
  echo "\$ moonrail serve --metadata etcd://$etcd --name 10.0.0.1 --size 32MiB --cores 1 --verify"
  "$MOONRAIL_BIN" serve --metadata "etcd://$etcd" --name 10.0.0.1 --size 32MiB --cores 1 --verify \
    > "$notes/serve.out" 2> "$notes/serve.err" &
  serve_pid=$!
  serving_or_gone() { grep -q '^listening on' "$notes/serve.out" || ! kill -0 "$serve_pid"; }
  until_true "$READY" "moonrail serve said nothing in $READY s" serving_or_gone
  show < "$notes/serve.out"
  grep -q '^listening on' "$notes/serve.out" || { show < "$notes/serve.err"; give_up "moonrail serve ended at once"; }

  lab-barrier serving
  lab-barrier measured

  step "6. Node 0 stops: rails are closed, its entry in etcd goes away"
  kill -TERM "$serve_pid"
  wait "$serve_pid" || { show < "$notes/serve.err"; give_up "moonrail serve ended with status $?"; }
  show < "$notes/serve.err"
  echo "    exit status 0"
}

node_1() {
  lab-barrier serving
  local name before=()
  name=$(sed -n 's/^listening on //p' "$notes/serve.out")
  for ((i = 0; i < NICS; i++)); do before+=("$(sent "$i") $(received "$i")"); done

  step "4. Node 1 opens $name, WRITEs and READs blocks of $BLOCKS, and checks every byte on both sides"
  run "$MOONRAIL_BIN" bench "$name" --metadata "etcd://$etcd" --name 10.0.0.2 --op both --block "$BLOCKS" \
    --batch 16 --iterations 2 --cores 1 --verify --ask-target

  step "5. What node 1's network devices counted meanwhile"
  for ((i = 0; i < NICS; i++)); do
    read -r tx rx <<< "${before[i]}"
    echo "    eth$i (rxe$i): $((($(sent "$i") - tx) / 1024)) KiB out, $((($(received "$i") - rx) / 1024)) KiB in"
  done
  lab-barrier measured
}

"node_$NODE"
