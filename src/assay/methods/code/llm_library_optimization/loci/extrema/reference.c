/* One pass: a byte that is not below all before it may be above them. Done after the row in which both ends are known to occur. */
#include <stdint.h>

void extrema(const uint8_t *const *rows, int width, int height, uint8_t *low, uint8_t *high)
{
    uint8_t smallest = rows[0][0], largest = rows[0][0];
    for (int y = 0; y < height && !(smallest == 0 && largest == 255); y++) {
        const uint8_t *row = rows[y];
        for (int x = 0; x < width; x++) {
            if (row[x] < smallest)
                smallest = row[x];
            else if (row[x] > largest)
                largest = row[x];
        }
    }
    *low = smallest;
    *high = largest;
}
