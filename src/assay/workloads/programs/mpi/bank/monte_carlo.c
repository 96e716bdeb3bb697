#include <stdio.h>
#include "mpi.h"

static unsigned long state;

static double next(void)
{
    state = (state * 1103515245UL + 12345UL) % 2147483648UL;
    return state / 2147483648.0;
}

int main(int argc, char *argv[])
{
    int myid, numprocs;
    long hits = 0, all = 0;
    long i, tries = 20000;

    MPI_Init(&argc, &argv);
    MPI_Comm_size(MPI_COMM_WORLD, &numprocs);
    MPI_Comm_rank(MPI_COMM_WORLD, &myid);
    state = 17 + myid;
    for (i = 0; i < tries; i++) {
        double x = next();
        double y = next();
        if (x * x + y * y < 1.0)
            hits++;
    }
    MPI_Reduce(&hits, &all, 1, MPI_LONG, MPI_SUM, 0, MPI_COMM_WORLD);
    if (myid == 0)
        printf("%ld of %ld\n", all, tries * numprocs);
    MPI_Finalize();
    return 0;
}
