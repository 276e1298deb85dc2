// st3-page.h - our page: which patches of a picture ST3 keeps, layer by layer.
#pragma once

#include <string>
#include <vector>

namespace httplib {
class Server;
}

// Paths of the page's files, which need no API key.
const std::vector<std::string> & st3_page_paths();

// Serves them below a prefix; at the root, too, where the build has no page of llama.cpp.
void st3_serve_page(httplib::Server & server, const std::string & prefix, bool at_root);
