// st3-server.h - what llama-server says of ST3: in answers, in /props and in the log.
#pragma once

#include "json.h"
#include "llama.h"

#include <string>

// What ST3 did with the pictures of a slot: the object of st3_report(), and
//   "layers": [[layers of the decoder that read each visual token, in order] for each picture]     null if not pruned in the compute;
//             null in the place of a picture of an earlier prompt
// null where the slot holds no picture, or ST3 is off. `line` says it for the log.
common_json st3_of_slot(const llama_context * ctx, llama_seq_id seq_id, std::string & line);

// Whether a context's memory holds all positions of a model whose attention slides, as with swa_full.
bool st3_holds_all(const llama_context * ctx);

// The schedule for /props: the object of st3_report() for no sequence; null where the model has no st3.* key.
common_json st3_of_model(const llama_context * ctx);

// An answer, or the last events of a streamed one, with st3 beside "timings"; as it is if st3 is null.
common_json st3_beside_timings(common_json answer, const common_json & st3);
