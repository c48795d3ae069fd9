// SPDX-License-Identifier: Apache-2.0
// A slow and unreliable disk, for LD_PRELOAD: below DISK_PLACE, every write waits DISK_MILLISECONDS, and while the file
// DISK_BROKEN exists, one in DISK_ONE_IN of them fails with an input/output error.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static unsigned number;

static int refused(int fd) {
    char link[64], path[PATH_MAX];
    const char *place = getenv("DISK_PLACE"), *slow = getenv("DISK_MILLISECONDS"), *one_in = getenv("DISK_ONE_IN");
    const char *broken = getenv("DISK_BROKEN");
    if (!place) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (strncmp(path, place, strlen(place))) return 0;
    if (slow) usleep(1000 * atoi(slow));
    if (!one_in || !broken || access(broken, F_OK)) return 0;
    if (__atomic_add_fetch(&number, 1, __ATOMIC_RELAXED) % atoi(one_in)) return 0;
    errno = EIO;
    return 1;
}

ssize_t write(int fd, const void *data, size_t count) {
    static ssize_t (*next)(int, const void *, size_t);
    if (!next) next = dlsym(RTLD_NEXT, "write");
    return refused(fd) ? -1 : next(fd, data, count);
}

ssize_t pwrite(int fd, const void *data, size_t count, off_t offset) {
    static ssize_t (*next)(int, const void *, size_t, off_t);
    if (!next) next = dlsym(RTLD_NEXT, "pwrite");
    return refused(fd) ? -1 : next(fd, data, count, offset);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    static ssize_t (*next)(int, const struct iovec *, int);
    if (!next) next = dlsym(RTLD_NEXT, "writev");
    return refused(fd) ? -1 : next(fd, parts, count);
}

int fsync(int fd) {
    static int (*next)(int);
    if (!next) next = dlsym(RTLD_NEXT, "fsync");
    return refused(fd) ? -1 : next(fd);
}
