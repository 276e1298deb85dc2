// st3-media.h - pictures that a request names by URL.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

// Whether an IPv4 or IPv6 address in text is one of the public internet: not of this machine, a private network, a
// link, a group, a transition mechanism (which could carry any of these), nor reserved. false for what is no address.
bool st3_is_public_address(const std::string & address);

// The body of an http:// URL whose host has public addresses only; the connection goes to an address that was checked.
// At most 10 MiB within 10 seconds; redirects are not followed. Throws std::invalid_argument with one line for the client
// where `allowed` is false, the URL cannot be used, or the fetch fails.
std::vector<uint8_t> st3_fetch(const std::string & url, bool allowed);
