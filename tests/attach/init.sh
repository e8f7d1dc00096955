#!/bin/sh
# PID 1 of the guest: brings up /dev, /proc, /sys and the network, then keeps a shell on the first serial port. The
# shell reads the port as a script, so it prints no prompt and echoes nothing; when it ends another is started.
export PATH=/usr/sbin:/bin HOME=/
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
ln -s /proc/self/fd /dev/fd
for module in $(cat /etc/modules); do
    modprobe "$module" || echo "init: modprobe $module failed" >/dev/kmsg
done
ip link set lo up
if ip link set eth0 up; then
    ip addr add 10.0.2.15/24 dev eth0
    ip route add default via 10.0.2.2
fi
exec 3<>/dev/ttyS0  # kept open: the last close of a serial port throws away what came in meanwhile
stty -F /dev/ttyS0 -echo -onlcr
while :; do
    echo '<guest shell ready>' >&3
    setsid -c /bin/sh /dev/ttyS0 <&3 >&3 2>&1 3>&-
done
