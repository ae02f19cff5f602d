# A file system on a new drive, data of our own in its last two zones, and what the drive looked like when it was left.
last=$((SIZE_MB / ZONE_MB - 1))
head -c 1M /dev/urandom >/share/pattern
modprobe btrfs
run mkfs.btrfs -q -f -O zoned -d single -m single "$DEV"
run mount -t btrfs "$DEV" /mnt
for i in 1 2 3; do
	head -c 8M /dev/urandom >/mnt/file$i
done
(cd /mnt && sha256sum file*) >/share/sums
run umount /mnt
run put /share/pattern $((last - 1)) 0
run blkzone finish -o $((last * ZONE_MB * 2048)) -c 1 "$DEV"
zones >/share/zones
cat /share/zones
