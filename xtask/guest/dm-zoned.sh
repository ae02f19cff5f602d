# dm-zoned makes a conventional disk out of the drive; ext4 on top overwrites in place.
run modprobe dm-zoned
run dmzadm --format "$DEV" --force
run dmzadm --start "$DEV"
udevadm settle
disk=$(ls /dev/mapper/dmz-*) || fail "no dm-zoned device"
run mkfs.ext4 -q "$disk"
run mount -t ext4 "$disk" /mnt
for i in 1 2 3 4; do
	head -c 12M /dev/urandom >/mnt/file$i
done
run sync
run dd if=/dev/urandom of=/mnt/file1 bs=4k count=200 seek=100 conv=notrunc,fsync status=none
run rm /mnt/file3
head -c 8M /dev/urandom >/mnt/file5
(cd /mnt && sha256sum file*) >/tmp/sums
run umount /mnt
run dmzadm --stop "$DEV"
run dmzadm --check "$DEV"
run dmzadm --start "$DEV"
udevadm settle
run e2fsck -f -n "$disk"
run mount -t ext4 "$disk" /mnt
(cd /mnt && sha256sum --quiet -c /tmp/sums) || fail "files have changed"
run umount /mnt
run dmzadm --stop "$DEV"
dmesg | grep -iE 'device-mapper: zoned.*(error|fail)' && fail "the kernel complains"
exit 0
