// What Hopper's threads leave to other units: barriers that wait for bytes, copies in bulk, products of warpgroups
// (csrc/cuda/hopper.cuh has the instructions).
//
// A copy lands some time after it was started, in any order with others; until then what it writes to is NaN bits.
// Products are made some time between their issue and the wait that covers them, from what shared memory holds by then,
// found as the operands' descriptors say, bit by bit; until that wait the sums are NaN. Under ThreadSanitizer a copy is
// a write by the thread that starts it, and products read where they are issued and once more where they are waited
// for; a phase of a barrier orders those that arrive before those that wait.
//
// Fails on: a barrier that was not initialised, or not published before a copy counts on it; more arrivals than it has;
// a wait that nothing ends; sums without their fence; warps of a group that issue different products; descriptors with
// unused bits set or that lead out of shared memory; addresses and sizes that are not multiples of 16.
//
// Not modelled: which of two generic writes an asynchronous read sees without a proxy fence (nothing is written that
// way here), and registers moved by setmaxnreg.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace shim {

uint32_t shared_address(const void *shared);
void initialise(uint64_t *barrier, int arrivals);
void publish_barriers();
void arrive(uint64_t *barrier, int expected_bytes);
void wait(uint64_t *barrier, int parity);
void copy_in_bulk(void *shared, const void *global, int bytes, uint64_t *arrival);
void begin_products(float (&sums)[64]);
void product(float (&sums)[64], uint64_t a, uint64_t b, bool add);
void end_product_group();
void wait_for_products(int groups);

}  // namespace shim
