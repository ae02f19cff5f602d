# The drive is back as it was put aside: its zones, and the files on them.
last=$((SIZE_MB / ZONE_MB - 1))
zones >/tmp/zones
run diff /share/zones /tmp/zones
run cmp /share/pattern <(get $((last - 1)) 0 1M)
unwritten $last 0 1M
# btrfs checks that zones that it does not know are empty.
run blkzone reset -o $(((last - 1) * ZONE_MB * 2048)) -c 2 "$DEV"
modprobe btrfs
run mount -t btrfs "$DEV" /mnt
(cd /mnt && sha256sum --quiet -c /share/sums) || fail "the files are not there"
[ -e /mnt/new ] && fail "a file of later is there"
echo "-- and it still works"
head -c 16M /dev/urandom >/mnt/newer || fail "cannot write"
run umount /mnt
run btrfs check --readonly "$DEV"
