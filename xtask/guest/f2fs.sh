# f2fs in zoned mode, its metadata in the conventional zones.
run mkfs.f2fs -q -f -m "$DEV"
run mount -t f2fs "$DEV" /mnt
mkdir /mnt/dir
for i in 1 2 3 4 5 6; do
	head -c 8M /dev/urandom >/mnt/dir/file$i
done
run rm /mnt/dir/file2 /mnt/dir/file4
head -c 4M /dev/urandom >/mnt/dir/file7
(cd /mnt/dir && sha256sum file*) >/tmp/sums
run sync
run umount /mnt
run fsck.f2fs "$DEV" >/tmp/fsck
grep -E 'FAIL|\[FIX\]|ASSERT' /tmp/fsck && fail "fsck.f2fs complains"
run mount -t f2fs "$DEV" /mnt
(cd /mnt/dir && sha256sum --quiet -c /tmp/sums) || fail "files have changed"
run umount /mnt
dmesg | grep -iE 'F2FS.*(error|inconsistent|corrupt)' && fail "the kernel complains"
exit 0
