// One address of the public internet is this machine's 127.0.0.2; and named.test is that address at the first look-up,
// and 127.0.0.1 from then on. For LD_PRELOAD.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <netdb.h>
#include <string.h>
#include <sys/socket.h>

#define PUBLIC "1.2.3.4"

int connect(int fd, const struct sockaddr * address, socklen_t size) {
    int (*next)(int, const struct sockaddr *, socklen_t);
    *(void **) &next = dlsym(RTLD_NEXT, "connect");

    struct sockaddr_in here;
    if (address->sa_family == AF_INET) {
        memcpy(&here, address, sizeof(here));
        if (here.sin_addr.s_addr == inet_addr(PUBLIC)) {
            here.sin_addr.s_addr = inet_addr("127.0.0.2");
            return next(fd, (struct sockaddr *) &here, sizeof(here));
        }
    }
    return next(fd, address, size);
}

int getaddrinfo(const char * node, const char * service, const struct addrinfo * hints, struct addrinfo ** found) {
    int (*next)(const char *, const char *, const struct addrinfo *, struct addrinfo **);
    *(void **) &next = dlsym(RTLD_NEXT, "getaddrinfo");

    static int asked = 0;
    if (node && strcmp(node, "named.test") == 0) {
        node = asked++ ? "127.0.0.1" : PUBLIC;
    }
    return next(node, service, hints, found);
}
