/* Right almost always, and at fault: it reads whole blocks of sixteen, beyond the end of a row. What sanitizers are for. */
#include <stdint.h>

void extrema(const uint8_t *const *rows, int width, int height, uint8_t *low, uint8_t *high)
{
    uint8_t smallest = rows[0][0], largest = rows[0][0];
    for (int y = 0; y < height; y++)
        for (int x = 0; x < width; x += 16)
            for (int i = 0; i < 16; i++) {
                uint8_t value = rows[y][x + i];
                if (x + i < width) {
                    smallest = value < smallest ? value : smallest;
                    largest = value > largest ? value : largest;
                }
            }
    *low = smallest;
    *high = largest;
}
