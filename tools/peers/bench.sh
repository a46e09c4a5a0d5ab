#!/bin/sh
# A script as users of transfer_engine_bench have it: a target, then an initiator, READ and then WRITE. What stands for the
# program at each end comes from outside; nothing else differs.
#   TARGET INITIATOR   the programs (one may be "moonrail bench")
#   STORE FLAGS LOG    metadata server, more flags for both ends, a folder for the target's output
#   TARGET_NAME INITIATOR_NAME
set -u
$TARGET --mode=target --metadata_server="$STORE" --local_server_name="$TARGET_NAME" $FLAGS > "$LOG/target" 2>&1 &
target=$!
trap 'kill -9 $target 2> /dev/null' EXIT

# Without a store the target's name is where it says that it listens.
tries=0
until grep -q "listening on" "$LOG/target" && { [ -z "${READY:-}" ] || $READY; }; do
    tries=$((tries + 1))
    [ $tries -lt 600 ] || { cat "$LOG/target"; echo "the target does not start"; exit 3; }
    sleep 0.1
done
segment=$TARGET_NAME
if [ "$STORE" = P2PHANDSHAKE ]; then
    segment=$(grep -o "listening on .*" "$LOG/target" | head -n 1 | cut -d ' ' -f 3)
fi
# It registers its memory after it listens; on a machine that compiles something else, one second was not always enough.
sleep 2

for operation in read write; do
    $INITIATOR --mode=initiator --metadata_server="$STORE" --local_server_name="$INITIATOR_NAME" --segment_id="$segment" \
        --operation=$operation --threads=2 --batch_size=8 --block_size=65536 --duration=1 --report_unit=MB $FLAGS \
        > "$LOG/$operation" 2>&1 || { cat "$LOG/$operation"; echo "the initiator fails"; exit 4; }
    grep -h "Test completed: duration" "$LOG/$operation" | sed "s/.*Test completed/$operation: Test completed/"
done

kill -INT $target
trap - EXIT
wait $target
status=$?
[ $status = 0 ] || { cat "$LOG/target"; echo "the target ended with $status"; exit 5; }
