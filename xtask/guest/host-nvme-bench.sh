# Sequential writes and appends by commands of zbdkit's own against fio's on the same namespace.
nvme
for ((i = 0; i < 100; i++)); do
	[ -c /dev/ng0n1 ] && break
	sleep 0.1
done
run zbdkit-drive bench /dev/ng0n1 --rounds 15
