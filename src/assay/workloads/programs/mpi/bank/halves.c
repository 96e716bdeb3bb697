#include <stdio.h>
#include <mpi.h>

int main(int argc, char *argv[])
{
    MPI_Comm half;
    int world_rank, half_rank, half_size, sum;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &world_rank);
    MPI_Comm_split(MPI_COMM_WORLD, world_rank % 2, world_rank, &half);
    MPI_Comm_rank(half, &half_rank);
    MPI_Comm_size(half, &half_size);
    MPI_Allreduce(&world_rank, &sum, 1, MPI_INT, MPI_SUM, half);
    printf("%d is %d of %d, sum %d\n", world_rank, half_rank, half_size, sum);
    MPI_Comm_free(&half);
    MPI_Finalize();
    return 0;
}
