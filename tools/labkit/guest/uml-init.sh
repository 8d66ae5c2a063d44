#!/bin/sh
# First program under User Mode Linux, whose root is the tree already: brings what main.sh expects, and hands over.
B=/bin/busybox
# A restart runs the kernel's program once more: it has to end, as a VM does.
[ ! -e /lab/run/begun ] || $B poweroff -f
: >/lab/run/begun
$B mount -t proc proc /proc
mountpoint -q /dev || $B mount -t devtmpfs dev /dev
$B mount -t tmpfs -o mode=755 run /run
$B cp -r /lab/run /run/lab
# Ports are serial lines here: they pass bytes on as they are.
for port in 1 2 3; do
    $B stty -F /dev/ttyS$port raw -echo
done
exec /bin/sh /run/lab/main.sh
