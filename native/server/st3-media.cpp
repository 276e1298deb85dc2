#include "st3-media.h"

#include "http.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

#ifdef _WIN32
#include <winsock2.h>
#include <ws2tcpip.h>
#else
#include <netdb.h>
#endif

static constexpr size_t MAX_BYTES   = 10 * 1024 * 1024;
static constexpr int    MAX_SECONDS = 10;

struct address_block {
    const char * first;
    int          bits;
};

// IANA's special-purpose registry for IPv4; and the only global unicast block of IPv6, less what in it is special.
static constexpr address_block SPECIAL_4[] = {
    {"0.0.0.0",       8 },
    { "10.0.0.0",     8 },
    { "100.64.0.0",   10},
    { "127.0.0.0",    8 },
    { "169.254.0.0",  16},
    { "172.16.0.0",   12},
    { "192.0.0.0",    24},
    { "192.0.2.0",    24},
    { "192.88.99.0",  24},
    { "192.168.0.0",  16},
    { "198.18.0.0",   15},
    { "198.51.100.0", 24},
    { "203.0.113.0",  24},
    { "224.0.0.0",    3 },
};
static constexpr address_block GLOBAL_6    = { "2000::", 3 };
static constexpr address_block SPECIAL_6[] = {
    {"2001::",      23},
    { "2001:db8::", 32},
    { "2002::",     16},
    { "3fff::",     20},
};

template <size_t N> static bool parse(const char * text, std::array<uint8_t, N> & out) {
    return inet_pton(N == 4 ? AF_INET : AF_INET6, text, out.data()) == 1;
}

template <size_t N> static bool is_in(const std::array<uint8_t, N> & address, const address_block & block) {
    std::array<uint8_t, N> first;
    parse(block.first, first);
    for (int bit = 0; bit < block.bits; ++bit) {
        const int mask = 0x80 >> (bit % 8);
        if ((address[bit / 8] & mask) != (first[bit / 8] & mask)) {
            return false;
        }
    }
    return true;
}

bool st3_is_public_address(const std::string & address) {
    std::array<uint8_t, 4>  v4;
    std::array<uint8_t, 16> v6;
    if (parse(address.c_str(), v4)) {
        return std::none_of(std::begin(SPECIAL_4), std::end(SPECIAL_4), [&](auto & b) { return is_in(v4, b); });
    }
    return parse(address.c_str(), v6) && is_in(v6, GLOBAL_6) &&
           std::none_of(std::begin(SPECIAL_6), std::end(SPECIAL_6), [&](auto & b) { return is_in(v6, b); });
}

// One address of the host, after a look at all of them.
static std::string public_address_of(const std::string & host) {
    addrinfo hints    = {};
    hints.ai_socktype = SOCK_STREAM;
    addrinfo * found  = nullptr;
    if (getaddrinfo(host.c_str(), nullptr, &hints, &found) != 0) {
        throw std::invalid_argument("the host of this URL cannot be resolved: " + host);
    }
    std::string first;
    bool        all_public = true;
    for (const addrinfo * a = found; a; a = a->ai_next) {
        char text[NI_MAXHOST];
        if (getnameinfo(a->ai_addr, a->ai_addrlen, text, sizeof(text), nullptr, 0, NI_NUMERICHOST) != 0) {
            all_public = false;
            break;
        }
        all_public = all_public && st3_is_public_address(text);
        first      = first.empty() ? text : first;
    }
    freeaddrinfo(found);
    if (!all_public || first.empty()) {
        throw std::invalid_argument("this URL names a host that is not on the public internet: " + host);
    }
    return first;
}

// Upstream looks for '@' and '/' in all of a URL, a path with '@' and a query behind the host alone among it.
static common_http_url parse_url(const std::string & url) {
    const size_t scheme = url.find("://");
    const size_t end    = scheme == std::string::npos ? scheme : url.find_first_of("/?#", scheme + 3);
    auto         parts  = common_http_parse_url(url.substr(0, end));
    const auto   rest   = end == std::string::npos ? "" : url.substr(end, url.find('#', end) - end);
    parts.path          = (rest.empty() || rest[0] != '/' ? "/" : "") + rest;
    return parts;
}

std::vector<uint8_t> st3_fetch(const std::string & url, bool allowed) {
    if (!allowed) {
        throw std::invalid_argument(
                "pictures are not fetched from URLs: send a data: URL, or start the server with --media-urls");
    }
    common_http_url parts;
    try {
        parts = parse_url(url);
    } catch (const std::exception & e) {
        throw std::invalid_argument(std::string("this URL cannot be used: ") + e.what());
    }
    if (parts.scheme != "http") {
        throw std::invalid_argument("this server fetches http:// URLs only: send the picture as a data: URL");
    }
    const std::string address = public_address_of(parts.host);

    httplib::Client client(parts.host, parts.port);
    client.set_hostname_addr_map({
            {parts.host, address}
    });  // a second look-up could give another address
    client.set_follow_location(false);   // to where nobody has looked
    client.set_max_timeout(MAX_SECONDS * 1000);
    client.set_connection_timeout(MAX_SECONDS);

    std::vector<uint8_t> body;
    const auto           result = client.Get(parts.path, [&](const char * data, size_t n) {
        body.insert(body.end(), data, data + n);
        return body.size() <= MAX_BYTES;
    });
    if (body.size() > MAX_BYTES) {
        throw std::invalid_argument("the picture at this URL has more than 10 MiB");
    }
    if (!result) {
        throw std::invalid_argument("the picture cannot be fetched: " + httplib::to_string(result.error()));
    }
    if (result->status != 200) {
        throw std::invalid_argument("the picture cannot be fetched: HTTP status " + std::to_string(result->status));
    }
    return body;
}
