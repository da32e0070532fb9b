#!/usr/bin/env bash
# A Slurm cluster of two nodes on this machine alone, for tests: munge, slurmctld and two slurmd on
# the loopback interface, everything in one folder. Needs root, and Debian's slurm-wlm and munge.
#
#   bash tests/slurm_loopback.sh up FOLDER     then: SLURM_CONF=FOLDER/slurm.conf srun -N2 hostname
#   bash tests/slurm_loopback.sh down FOLDER
set -euo pipefail
action=${1:?up or down} folder=${2:?a folder}
marker="# shardpage slurm_loopback"

up() {
  mkdir -p "$folder"/{state,n0,n1,munge}
  chmod 755 "$folder"
  cores=$(nproc)
  memory=$(awk '/MemTotal/ {print int($2 / 2048)}' /proc/meminfo)
  cat >"$folder/slurm.conf" <<CONF
ClusterName=loopback
SlurmctldHost=localhost
SlurmUser=root
SlurmctldPort=16817
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/linear
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
NodeName=n0 NodeHostname=localhost NodeAddr=127.0.0.1 Port=16818 CPUs=$cores RealMemory=$memory
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=16819 CPUs=$cores RealMemory=$memory
PartitionName=all Nodes=n0,n1 Default=YES MaxTime=10 State=UP
CONF
  # JAX connects to the first node by its name.
  grep -q "$marker" /etc/hosts || echo "127.0.0.1 n0 n1 $marker" >>/etc/hosts
  (umask 077 && dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none)
  chmod 711 "$folder/munge"
  munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" \
    --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge/seed"
  export SLURM_CONF=$folder/slurm.conf
  slurmctld -c
  slurmd -N n0
  slurmd -N n1
  for _ in $(seq 50); do
    if [[ $(sinfo --noheader --format=%T 2>/dev/null) == idle ]]; then
      return
    fi
    sleep 0.2
  done
  sinfo >&2 || true
  tail -n 5 "$folder"/*.log >&2
  return 1
}

down() {
  export SLURM_CONF=$folder/slurm.conf
  timeout 10 scancel --partition=all 2>/dev/null || true
  for _ in $(seq 50); do # while jobs end
    [[ -n $(timeout 5 squeue --noheader 2>/dev/null) ]] || break
    sleep 0.2
  done
  pids=()
  for name in n0 n1 slurmctld munged; do
    if [[ -f $folder/$name.pid ]]; then
      pids+=("$(<"$folder/$name.pid")")
      kill "${pids[-1]}" 2>/dev/null || true
    fi
  done
  for _ in $(seq 50); do
    alive=no
    for pid in "${pids[@]}"; do
      # one that has ended may still be listed, if nobody has asked how
      grep -qs '^State:.[^Z]' "/proc/$pid/status" && alive=yes
    done
    [[ $alive == no ]] && break
    sleep 0.2
  done
  sed -i "/$marker/d" /etc/hosts 2>/dev/null ||
    { grep -v "$marker" /etc/hosts >"$folder/hosts" && cat "$folder/hosts" >/etc/hosts; }
}

case $action in
  up) up ;;
  down) down ;;
  *) exit 2 ;;
esac
