#!/usr/bin/env bash
# shardpage on v5p:2x2x2: 2 hosts of 4 chips, 8 devices, on TPU VMs.
#
#   bash tpu_vm.sh create     costs money from here on
#   bash tpu_vm.sh install    this folder's project to every host; again after a change
#   bash tpu_vm.sh doctor     is every host ready?
#   bash tpu_vm.sh run        the job, on all hosts at once
#   bash tpu_vm.sh delete     costs end
#
# The project of gcloud is that of `gcloud config get project`.
set -euo pipefail
name=shardpage
zone=ZONE

# On all hosts at the same time: started on one alone, JAX waits for the others.
everywhere() {
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

case ${1:-} in
  create)
    gcloud compute tpus tpu-vm create "$name" --zone="$zone" \
      --accelerator-type=v5p-16 --version=v2-alpha-tpuv5
    ;;
  install)
    gcloud compute tpus tpu-vm scp --recurse --zone="$zone" --worker=all . "$name:shardpage"
    everywhere "pip install --quiet --user './shardpage[tpu,demo]'"
    ;;
  doctor) everywhere "PATH=\$HOME/.local/bin:\$PATH shardpage doctor" ;;
  run)
    # JAX asks each VM's metadata who it is; nothing needs to be set.
    job='export SHARDPAGE_MESH=data=2,context=4
shardpage verify'
    everywhere "export PATH=\$HOME/.local/bin:\$PATH
$job"
    ;;
  delete) gcloud compute tpus tpu-vm delete "$name" --zone="$zone" ;;
  *)
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
