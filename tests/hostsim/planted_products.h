// planted_products.cpp. rows (64, row_bytes), codes (tiles, 128, row_bytes), out (64, tiles * 128).
#pragma once

int planted_products(int row_bytes, int tiles, int fault, const void *rows, const void *codes, float *out);
