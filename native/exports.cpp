// The pool's size for callers that are not Python: threadpoolctl finds these symbols in the loaded
// module (src/crossent/_threadpoolctl.py).
#include "parallel.h"

#define CROSSENT_EXPORT extern "C" __attribute__((visibility("default")))

CROSSENT_EXPORT int crossent_get_num_threads();
CROSSENT_EXPORT void crossent_set_num_threads(int n);

int crossent_get_num_threads() { return crossent::num_threads(); }
void crossent_set_num_threads(int n) { crossent::set_num_threads(n); }
