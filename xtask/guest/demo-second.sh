# The second half of the demonstration: everything was restarted; the file is there.
echo "-- The same drive, after the guest and the daemon were restarted:"
run lsblk -z "$DEV"
run blkzone report "$DEV"
run mount -t btrfs "$DEV" /mnt
run ls -l /mnt/home
run cat /mnt/home/hello.txt
expect "hello.txt" "$HELLO" "$(cat /mnt/home/hello.txt)"
run umount /mnt
run btrfs check --readonly "$DEV"
