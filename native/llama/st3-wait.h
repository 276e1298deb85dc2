// st3-wait.h - the seam where llama_decode lets an image wait for its question, so that both become one pruned prompt.
// Deletable once upstream mixes tokens and embeddings in a batch.
#pragma once

#include "llama.h"

// Decodes what waits in a sequence as it came: its images are cut down afterwards. Returns a llama_decode() code; whatever it
// is but 0, everything waits on.
int st3_decode_waiting(llama_context & ctx, llama_seq_id seq_id);
