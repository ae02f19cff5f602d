# btrfs in zoned mode: files, a snapshot, deletion, garbage collection, scrub, check, remount.
modprobe btrfs
run mkfs.btrfs -q -f -O zoned -d single -m single "$DEV"
run mount -t btrfs "$DEV" /mnt
run btrfs subvolume create /mnt/sub
for i in 1 2 3 4; do
	head -c 8M /dev/urandom >/mnt/sub/file$i
done
(cd /mnt/sub && sha256sum file*) >/tmp/sums
run sync
run btrfs subvolume snapshot -r /mnt/sub /mnt/snapshot
run rm /mnt/sub/file1 /mnt/sub/file2
for i in 5 6; do
	head -c 8M /dev/urandom >/mnt/sub/file$i
	sync
done
run btrfs scrub start -B /mnt
run umount /mnt
run btrfs check --readonly "$DEV"
run mount -t btrfs "$DEV" /mnt
(cd /mnt/snapshot && sha256sum --quiet -c /tmp/sums) || fail "the snapshot has changed"
run btrfs subvolume delete /mnt/snapshot
run btrfs filesystem sync /mnt
run btrfs balance start -dusage=50 /mnt
(cd /mnt/sub && grep -E 'file[34]' /tmp/sums | sha256sum --quiet -c) || fail "files have changed"
run umount /mnt
run btrfs check --readonly "$DEV"
dmesg | grep -iE 'btrfs.*(error|corrupt|critical)' && fail "the kernel complains"
exit 0
