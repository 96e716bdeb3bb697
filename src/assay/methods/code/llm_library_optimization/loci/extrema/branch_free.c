/* Two choices that do not depend on each other, so that a compiler can make minima and maxima of vectors of them.
   Every row is looked at, whatever was found before. */
#include <stdint.h>

void extrema(const uint8_t *const *rows, int width, int height, uint8_t *low, uint8_t *high)
{
    uint8_t smallest = rows[0][0], largest = rows[0][0];
    for (int y = 0; y < height; y++) {
        const uint8_t *row = rows[y];
        for (int x = 0; x < width; x++) {
            smallest = row[x] < smallest ? row[x] : smallest;
            largest = row[x] > largest ? row[x] : largest;
        }
    }
    *low = smallest;
    *high = largest;
}
