# Sequential writes and appends through zbdkit's block layer against fio on the device itself.
null_blk size=2048 zone_size=64 blocksize=4096
run zbdkit-drive bench /dev/nullb0
