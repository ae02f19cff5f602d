# The drive was put aside: here it is as it was, and everything on it is changed.
last=$((SIZE_MB / ZONE_MB - 1))
zones >/tmp/zones
run diff /share/zones /tmp/zones
modprobe btrfs
run mount -t btrfs "$DEV" /mnt
(cd /mnt && sha256sum --quiet -c /share/sums) || fail "the files are not there"
run rm /mnt/file1
run cp /mnt/file2 /mnt/file3
head -c 64M /dev/urandom >/mnt/new || fail "cannot write"
run umount /mnt
run blkzone reset -o $(((last - 1) * ZONE_MB * 2048)) -c 2 "$DEV"
unwritten $((last - 1)) 0 1M
run put /share/pattern $last 0
zones >/tmp/zones
cmp -s /share/zones /tmp/zones && fail "nothing has changed"
cat /tmp/zones
