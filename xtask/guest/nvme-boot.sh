# Booted by the firmware from a namespace, twice (TIME). Nothing else is there to boot from: kernel, root and all are on it.
find_nvme 2
[ -z "$(ls /sys/block | grep '^vd')" ] || fail "there is another disk"
run cat /proc/cmdline
expect "what the boot loader loaded" "BOOT_IMAGE=/vmlinuz" "$(grep -o 'BOOT_IMAGE=[^ ]*' /proc/cmdline)"
expect "the root" "${PLAIN}p2 ext4" "$(findmnt -n -o SOURCE,FSTYPE / | tr -s ' ')"
run lsblk -z "$DEV" "$PLAIN"
modprobe btrfs

if [ "$TIME" = first ]; then
	[ -e /var/was-here ] && fail "this is not the first time"
	echo "the first time" >/var/was-here || fail "cannot write to the root"
	expect "empty zones" $((SIZE_MB / ZONE_MB)) "$(blkzone report "$DEV" | grep -c '(em)')"
	run mkfs.btrfs -q -f -O zoned -d single -m single "$DEV"
	run mount -t btrfs "$DEV" /mnt
	# Out of the root, into the zones.
	run cp -r /usr/lib/udev /mnt
	run umount /mnt
	run mount -o remount,ro /
else
	expect "what the first time left on the root" "the first time" "$(cat /var/was-here)"
	run mount -t btrfs "$DEV" /mnt
	run diff -r /usr/lib/udev /mnt/udev
	run umount /mnt
	run btrfs check --readonly "$DEV"
fi
blkzone report "$DEV" | grep -qv '(em)' || fail "no zone was written"
expect "kernel's complaints" 0 "$(dmesg | grep -cE 'nvme.*timeout|I/O error')"
