# Devices that fail: each failure reaches the client as what it is, nothing hangs, and the write pointer stays right.
steps() { # steps DEVICE [--door ZBDKIT], lines from standard input
	echo "guest# zbdkit-drive steps $*"
	zbdkit-drive steps "$@" || fail "steps on $1"
}
door="--door /usr/local/bin/zbdkit"
config=/sys/kernel/config/nullb/nullb0

for way in "" "$door"; do
	echo "== null_blk: bad blocks ${way:+through a door}"
	null_blk blocksize=4096
	steps /dev/nullb0 $way <<-END
		append 3 4096 => ok 0
		sh echo +24592-24599 >$config/badblocks => ok
		append 3 4096 => ok 4096
		append 3 4096 => Io
		zone 3 => implicitly open 8192
		write 3 8192 8192 => Io
		write 3 4096 4096 => NotAtWritePointer
		zone 3 => implicitly open 8192
		append 4 4096 => ok 0
		sh echo -24592-24599 >$config/badblocks => ok
		append 3 4096 => ok 8192
		read 3 8192 4096 => ok
	END

	echo "== null_blk: zones that become read-only and offline ${way:+through a door}"
	null_blk blocksize=4096
	steps /dev/nullb0 $way <<-END
		append 4 4096 => ok 0
		sh echo 32768 >$config/zone_readonly => ok
		append 4 4096 => ReadOnly
		write 4 4096 4096 => ReadOnly
		reset 4 => ReadOnly
		read 4 0 4096 => ok
		zone 4 => read-only
		sh echo 40960 >$config/zone_offline => ok
		append 5 4096 => Offline
		read 5 0 4096 => Offline
		finish 5 => Offline
		zone 5 => offline
		append 6 4096 => ok 0
		reset-all => ok
		append 6 4096 => ok 0
	END
done

echo "== what others do to a zone is noticed"
null_blk blocksize=4096 zone_max_open=2
steps /dev/nullb0 <<-END
	append 3 8192 => ok 0
	behind reset 3 => ok
	write 3 0 4096 => ok
	sh dd if=/dev/zero of=/dev/nullb0 bs=4k count=1 seek=3073 oflag=direct status=none => ok
	append 3 4096 => ok 8192
	behind finish 3 => ok
	append 3 4096 => Full
	behind reset 3 => ok
	append 3 4096 => ok 0
	open 4 => ok
	open 5 => ok
	open 6 => TooManyOpen
	append 6 4096 => TooManyOpen
	close 4 => ok
	append 6 4096 => ok 0
END

echo "== scsi_debug: a medium error, once"
scsi_debug
mountpoint -q /sys/kernel/debug || mount -t debugfs debugfs /sys/kernel/debug
address=$(ls /sys/block/${scsi#/dev/}/device/scsi_device)
inject=/sys/kernel/debug/scsi_debug/$address/error
steps "$scsi" <<-END
	append 3 4096 => ok 0
	sh echo "2 -1 0x8a 0 0 2 3 0x11 0" >$inject => ok
	append 3 4096 => Io No data available
	zone 3 => implicitly open 4096
	append 3 4096 => ok 4096
	write 3 8192 4096 => ok
	read 3 8192 4096 => ok
END

echo "== devices that go away under load"
null_blk blocksize=4096
run zbdkit-drive flood /dev/nullb0 "echo 0 >$config/power"
scsi_debug
run zbdkit-drive flood "$scsi" "echo 1 >/sys/block/${scsi#/dev/}/device/delete"
nvme
run zbdkit-drive flood /dev/nvme0n1 "echo 1 >/sys/class/nvme/nvme0/device/remove"

echo "== and a device that is well"
null_blk blocksize=4096
run zbdkit-drive flood /dev/nullb0 true
run zbdkit-drive conform /dev/nullb0
