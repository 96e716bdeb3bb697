#include <stdio.h>
#include <mpi.h>

int main(int argc, char *argv[])
{
    int rank, size, phase, partner, mine, theirs;
    MPI_Status status;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    mine = (rank * 29 + 13) % 31;
    for (phase = 0; phase < size; phase++) {
        if ((phase + rank) % 2 == 0)
            partner = rank + 1;
        else
            partner = rank - 1;
        if (partner < 0 || partner >= size)
            continue;
        MPI_Sendrecv(&mine, 1, MPI_INT, partner, phase, &theirs, 1, MPI_INT, partner, phase, MPI_COMM_WORLD, &status);
        if (rank < partner) {
            if (theirs < mine)
                mine = theirs;
        } else if (theirs > mine) {
            mine = theirs;
        }
    }
    printf("place %d has %d\n", rank, mine);
    MPI_Finalize();
    return 0;
}
