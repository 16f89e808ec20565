#!/bin/bash
# Trains on several hosts that ssh reaches, one process each, with the same folder everywhere:
#   docs/launch/ssh.sh "node1 node2 node3" configs/small.py --workdir /shared/small
#
# Ctrl-C here stops all of them after the same step, saved. The first host listens on PORT.
set -euo pipefail
read -ra hosts <<<"$1"
shift
port=${PORT:-9876}
here=$(pwd)
arguments=$(printf "%q " "$@")

pids=()
for index in "${!hosts[@]}"; do
    # With a terminal (-tt) the remote process gets the Ctrl-C that ends its ssh.
    ssh -tt "${hosts[$index]}" "cd $(printf %q "$here") && source .venv/bin/activate && \
        exec python -u tools/train.py $arguments --coordinator ${hosts[0]}:$port \
        --num-processes ${#hosts[@]} --process-id $index" </dev/null &
    pids+=($!)
done

code=0
for pid in "${pids[@]}"; do
    wait "$pid" || code=$?
done
exit "$code"
