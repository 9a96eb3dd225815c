#!/bin/sh
# Trains the denoiser of photographs on whatever accelerator there is, on a longer schedule than the configuration's.
#
#     benchmarks/train_photographs.sh [PHOTOS [STEPS [further words of lightning-em fit]]]
#
# The weights are then in the directory of the run, logs/photographs/version_N/pretrained. Interrupted, it goes on by the
# same command with `--ckpt_path logs/photographs/version_N/checkpoints/last.ckpt` behind it.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
photos=${1:-${LIGHTNING_EM_DATA:-$here/../shared/data}/photos}
steps=${2:-300000}
[ $# -gt 2 ] && shift 2 || set --
exec lightning-em fit -c "$here/configs/photographs.yaml" --data.root "$photos" --trainer.accelerator auto \
    --trainer.max_steps "$steps" --model.lr_scheduler.total_steps "$steps" \
    --trainer.check_val_every_n_epoch 20 --data.num_workers 4 --data.batch_size 32 "$@"
